"""Python client: text in, streamed text out, from a server (`Client`, `AsyncClient`) or in this process (`LocalClient`).

    with Client("localhost:8001") as client:
        for chunk in client.stream("The capital of France is", adapter="alice/sql", max_tokens=24):
            print(chunk.text, end="", flush=True)

Errors are those of `jaxlora.errors`, whichever of the three raised them, `ServerUnreachable` and `AccessDenied`.
"""

from typing import Any

from client.answers import Chunk, Completion, Usage
from client.catalogue import Adapter, Version
from client.errors import AccessDenied, ServerUnreachable
from client.interface import LanguageModel, Stream
from client.remote import Client
from client.requests import Message, Prompt, Sampling

__all__ = [
    "AccessDenied",
    "Adapter",
    "AsyncClient",
    "Chunk",
    "Client",
    "Completion",
    "LanguageModel",
    "LocalClient",
    "Message",
    "Prompt",
    "Sampling",
    "ServerUnreachable",
    "Stream",
    "Usage",
    "Version",
]


def __getattr__(name: str) -> Any:
    # What not everybody needs: asyncio, and above all JAX.
    if name == "AsyncClient":
        from client.aio import AsyncClient

        return AsyncClient
    if name == "LocalClient":
        from client.local import LocalClient

        return LocalClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
