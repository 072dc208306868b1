"""One adapter with fifty times another's load: the other's time to first token, alone and beside it."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Self

from bench import adapters, measure as arithmetic
from bench.scenarios.context import Context
from bench.worker import Request
from client.aio import AsyncClient

PROMPT, ANSWER, REQUESTS, TIMES_AS_MUCH = 64, 64, 20, 50
SHORT_ANSWER = 16
"""Of the one stream: its first tokens are what counts."""


def measure(context: Context) -> dict[str, Any]:
    settings = context.settings_of()
    prepared = adapters.prepare(context.cache, context.config, settings, adapters.sixteen())
    light, heavy = prepared.names[:2]
    found: dict[str, dict[str, list[float]]] = {kind: {"ttft_ms": [], "step_ms": []} for kind in ("alone", "beside")}
    with context.systems(["triton"], prepared, settings) as session:
        url = session.running["triton"].worker.call("address")
        for repetition in range(-1, context.options.repeat):
            requests = _requests(context, light, repetition)
            answers = {"alone": session.turn("triton", requests, 1)[0]}
            with Crowd(url, heavy, lambda *seed: context.prompts.make(PROMPT, repetition + 1, *seed)[1]):
                answers["beside"] = session.turn("triton", _requests(context, light, repetition, 1), 1)[0]
            if repetition >= 0:
                for kind, each in answers.items():
                    run = arithmetic.run_of(each, PROMPT * REQUESTS)
                    found[kind]["ttft_ms"] += [value * 1e3 for value in run.ttft]
                    found[kind]["step_ms"] += [value * 1e3 for value in run.tpot]
    p50, p95 = ({kind: arithmetic.percentile(values["ttft_ms"], percent) for kind, values in found.items()} for percent in (50, 95))
    step = arithmetic.percentile(found["beside"]["step_ms"], 95)
    return {
        "title": f"Fairness: one stream, and {TIMES_AS_MUCH} of another adapter beside it, through Triton, {context.dtype}",
        "columns": ["", "time to first token p50, ms", "p95, ms", "p95 over alone"],
        "rows": [[kind, f"{p50[kind]:.0f}", f"{p95[kind]:.0f}", f"{p95[kind] / p95['alone']:.2f}"] for kind in found],
        "note": f"Half more than alone and two steps of the engine are {1.5 * p95['alone'] + 2 * step:.0f} ms. "
        f"A step is the time from one token to the next beside the others, its p95: {step:.0f} ms.",
        "times": found,
    }


def _requests(context: Context, adapter: str, *seed: int) -> list[Request]:
    made = (context.prompts.make(PROMPT, *(part + 1 for part in seed), index, REQUESTS) for index in range(REQUESTS))
    return [Request(ids, text, SHORT_ANSWER, adapter) for ids, text in made]


class Crowd(threading.Thread):
    """So many clients that ask again whenever they have an answer, from a thread of its own, while the `with` block runs.

    Arguments:
        prompt: the text of a prompt for a client and the number of its request.
    """

    def __init__(self, url: str, adapter: str, prompt: Callable[[int, int], str]):
        super().__init__()
        self._url, self._adapter, self._prompt = url, adapter, prompt
        self._answered, self._over = threading.Event(), threading.Event()
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        """Returns when the first answer is there: all slots are taken, and the queue is full of requests."""
        self.start()
        self._answered.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self.join()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        try:
            asyncio.run(self._ask())
        except Exception as error:
            self._error = error
        self._answered.set()

    async def _ask(self) -> None:
        async with AsyncClient(self._url) as client, asyncio.TaskGroup() as clients:
            for number in range(TIMES_AS_MUCH):
                clients.create_task(self._ask_again(client, number))

    async def _ask_again(self, client: AsyncClient, number: int) -> None:
        asked = 0
        while not self._over.is_set():
            await client.generate(self._prompt(number, asked), adapter=self._adapter, max_tokens=ANSWER, ignore_eos=True)
            self._answered.set()
            asked += 1
