"""Keeps so many requests under way in one event loop, and notes when each response arrived; what is in them is read afterwards."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from bench.worker import Answer, Request


async def closed_loop(
    requests: Sequence[Request], concurrency: int, send: Callable[[Request], Awaitable[Answer]]
) -> list[Answer]:
    """The answers to all requests, in order; whenever one ends, the next begins."""
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(requests))

    async def stream() -> None:
        for index, request in waiting:
            answers[index] = await send(request)

    await asyncio.gather(*(stream() for _ in range(min(concurrency, len(requests)))))
    return [answers[index] for index in range(len(requests))]


async def stamped(responses: AsyncIterator[bytes]) -> tuple[float, list[tuple[float, bytes]]]:
    """When a request was sent, and its responses with their times of arrival."""
    sent = time.monotonic()
    return sent, [(time.monotonic(), response) async for response in responses]


async def server_sent_events(host: str, port: int, path: str, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
    """Posts JSON and gives the data of each server-sent event of the answer (https://html.spec.whatwg.org/multipage/server-sent-events.html).

    Raises:
        OSError: no connection, or an answer that is no stream, with its text.
    """
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        headers = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in headers.split(b"\r\n", 1)[0]:
            raise OSError(f"{path}: {headers.decode(errors='replace').strip()} {(await reader.read()).decode(errors='replace')}")
        # Sizes of chunks are lines without a colon in front, so the data can be told apart without them.
        async for line in reader:
            if line.startswith(b"data: "):
                yield line[6:].strip()
    finally:
        writer.close()
