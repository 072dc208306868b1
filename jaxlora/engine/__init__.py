"""Continuous batching over a fixed number of slots. Knows token ids and adapter keys; knows neither text nor Triton."""

from jaxlora.engine.engine import Engine, Handle
from jaxlora.engine.limits import Account, Bounds, Limits
from jaxlora.engine.program import Program, Sizes
from jaxlora.engine.requests import Request, Result, SamplingParams, Sink, Timings, Token

__all__ = [
    "Account", "Bounds", "Engine", "Handle", "Limits", "Program", "Request", "Result", "SamplingParams", "Sink", "Sizes", "Timings", "Token",
]  # fmt: skip
