"""Publishing while others generate: new versions go live through Triton's model control, and the streams should not notice."""

import threading
import time
from typing import Any

from bench import adapters, measure as arithmetic
from bench.scenarios.context import Context
from bench.worker import Request
from jaxlora.adapters import publish

PROMPT, ANSWER, STREAMS = 64, 128, 8
PUBLISHED_A_TURN = 3
NAME = "bench/published"


def measure(context: Context) -> dict[str, Any]:
    settings = context.settings_of()
    cache = context.cache / "publish"
    prepared = adapters.prepare(cache, context.config, settings, adapters.sixteen())
    gaps: dict[str, list[float]] = {"without": [], "with": []}
    seconds: list[float] = []
    with context.systems(["triton"], prepared, settings) as session:
        triton = session.running["triton"].worker
        for repetition in range(-1, context.options.repeat):
            for kind, found in gaps.items():
                requests = _requests(context, prepared.names, repetition, kind)
                publisher = _Publisher(context, prepared, triton.call("address"), repetition)
                if kind == "with":
                    publisher.start()
                answers, _ = session.turn("triton", requests, STREAMS)
                if kind == "with":
                    publisher.join()
                if repetition >= 0:
                    found.extend(gap * 1e3 for gap in arithmetic.run_of(answers, PROMPT * len(requests)).tpot)
                    seconds.extend(publisher.seconds)
    p99 = {kind: arithmetic.percentile(found, 99) for kind, found in gaps.items()}
    rows = [[kind, f"{arithmetic.percentile(found, 50):.1f}", f"{p99[kind]:.1f}", f"{max(found):.1f}"] for kind, found in gaps.items()]
    return {
        "title": f"Publishing under load: {STREAMS} streams through Triton, {context.dtype}",
        "columns": ["", "time per token p50, ms", "p99, ms", "longest, ms"],
        "rows": rows,
        "note": f"{len(seconds)} versions published, {arithmetic.percentile(seconds, 50):.2f} s each from the files to being live; no request failed; "
        f"p99 with publishing over without: {p99['with'] / p99['without']:.2f}.",
        "p99_ms": p99,
        "publish_s": seconds,
    }


class _Publisher(threading.Thread):
    """Publishes and makes live, with a pause between, from a thread of its own."""

    def __init__(self, context: Context, prepared: adapters.Prepared, url: str, repetition: int):
        super().__init__()
        self._config, self._prepared, self._url, self._repetition = context.config, prepared, url, repetition
        self.seconds: list[float] = []
        self.error: Exception | None = None

    def run(self) -> None:
        from client import Client

        try:
            with Client(self._url) as client:
                for index in range(PUBLISHED_A_TURN):
                    adapter = adapters.random_adapter(self._config, 16, 1000 * (self._repetition + 2) + index)
                    begin = time.monotonic()
                    publish(adapter, NAME, self._prepared.store)
                    client.load_adapters()
                    self.seconds.append(time.monotonic() - begin)
        except Exception as error:
            self.error = error

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self.error is not None:
            raise self.error


def _requests(context: Context, names: list[str], repetition: int, kind: str) -> list[Request]:
    made = (context.prompts.make(PROMPT, repetition + 1, len(kind), index) for index in range(2 * STREAMS))
    return [Request(ids, text, ANSWER, names[index % STREAMS]) for index, (ids, text) in enumerate(made)]
