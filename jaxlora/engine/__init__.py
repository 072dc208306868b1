"""Continuous batching over a fixed number of slots. Knows token ids and adapter keys; knows neither text nor Triton."""

from jaxlora.engine.engine import Engine
from jaxlora.engine.faults import FaultyProgram
from jaxlora.engine.health import Health, Thresholds
from jaxlora.engine.limits import Account, Bounds, Limits
from jaxlora.engine.program import Program, Sizes
from jaxlora.engine.requests import Handle, Request, Result, SamplingParams, Sink, Timings, Token

__all__ = [
    "Account", "Bounds", "Engine", "FaultyProgram", "Handle", "Health", "Limits", "Program", "Request", "Result", "SamplingParams", "Sink",
    "Sizes", "Thresholds", "Timings", "Token",
]  # fmt: skip
