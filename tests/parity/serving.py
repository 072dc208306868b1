"""Answers of the engine for a list of prompts, all of them in its queue at once."""

import queue
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future

from jaxlora.backend import Backend
from jaxlora.config import ModelConfig
from jaxlora.engine import Engine, Limits, Program, Request, Result, SamplingParams, Sizes, Token
from jaxlora.errors import ServingError
from jaxlora.peft import LoraAdapter
from jaxlora.weights import Weights

TIMEOUT_S = 300.0


class Answer:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self._tokens: list[Token] = []
        self._end: queue.Queue[Result | ServingError] = queue.Queue()

    def token(self, token: Token) -> bool:
        self._tokens.append(token)
        return False

    def finish(self, result: Result) -> None:
        self._end.put(result)

    def fail(self, error: ServingError) -> None:
        self._end.put(error)

    def tokens(self) -> list[Token]:
        """The whole answer, once it is there."""
        end = self._end.get(timeout=TIMEOUT_S)
        if isinstance(end, ServingError):
            raise end
        return self._tokens


def answers(
    config: ModelConfig,
    weights: Weights,
    backend: Backend,
    sizes: Sizes,
    adapters: Mapping[str, LoraAdapter],
    prompts: Sequence[tuple[str | None, Sequence[int]]],
    max_tokens: int,
    dtype: str = "float32",
) -> Iterator[list[Token]]:
    """The greedy answers to (adapter or None, prompt) in order, with log-probabilities, by one engine that is stopped at the end."""

    def read(name: str) -> "Future[LoraAdapter]":
        found: Future[LoraAdapter] = Future()
        found.set_result(adapters[name])
        return found

    program = Program(config, weights, backend, sizes, dtype)
    program.allocate()
    engine = Engine(program, read, Limits(queue_timeout_s=TIMEOUT_S))
    try:
        sinks = []
        for adapter, prompt in prompts:
            sinks.append(Answer())
            engine.submit(Request(tuple(prompt), SamplingParams(max_tokens=max_tokens, logprobs=20), sinks[-1], adapter))
        yield from [sink.tokens() for sink in sinks]
    finally:
        engine.stop()
