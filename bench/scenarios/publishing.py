"""Publishing while others generate: every few seconds a new version goes live through Triton's model control, a stream asks for the newest, and the
other streams should not notice."""

import contextlib
import itertools
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench import adapters, measure as arithmetic
from bench.scenarios.context import Context
from bench.worker import Request
from client import Client
from jaxlora.adapters import AdapterName, Store, catalogue_path, publish

PROMPT, ANSWER, STREAMS = 64, 128, 8
NAME = "bench/published"
RANK, DIFFERENT = 16, 3
EVERY_S = 2.0


def measure(context: Context) -> dict[str, Any]:
    settings = context.settings_of()
    prepared = adapters.prepare(context.cache / "publish", context.config, settings, adapters.sixteen())
    gaps: dict[str, list[float]] = {"without": [], "with": []}
    seconds: list[float] = []
    try:
        with context.systems(["triton"], prepared, settings) as session, Client(session.running["triton"].worker.call("address")) as client:
            publisher = _Publisher(context, prepared, client)
            publisher.publish()
            for repetition in range(-1, context.options.repeat):
                for kind, found in gaps.items():
                    requests = _requests(context, prepared.names, repetition, kind)
                    published = len(publisher.seconds)
                    with publisher.beside() if kind == "with" else contextlib.nullcontext():
                        answers, _ = session.turn("triton", requests, STREAMS)
                    if repetition >= 0:
                        others = [answer for answer, request in zip(answers, requests) if request.adapter != NAME]
                        found.extend(gap * 1e3 for answer in others for gap in arithmetic.token_times(arithmetic.timeline(answer)))
                        seconds.extend(publisher.seconds[published:])
    finally:
        shutil.rmtree(Store(prepared.store).adapter_path(AdapterName.parse(NAME)), ignore_errors=True)
        catalogue_path(settings.cache_dir, prepared.store).unlink(missing_ok=True)  # it would hold the next run to the versions of this one
    p99 = {kind: arithmetic.percentile(found, 99) for kind, found in gaps.items()}
    rows = [[kind, f"{arithmetic.percentile(found, 50):.1f}", f"{p99[kind]:.1f}", f"{max(found):.1f}"] for kind, found in gaps.items()]
    return {
        "title": f"Publishing under load: {STREAMS} streams through Triton, one of them on the adapter that is published, {context.dtype}",
        "columns": ["the other streams", "time per token p50, ms", "p99, ms", "longest, ms"],
        "rows": rows,
        "note": f"{len(seconds)} versions published, one every {EVERY_S:g} s, {arithmetic.percentile(seconds, 50):.2f} s each from the files to being live; "
        f"no request failed; p99 with publishing over without: {p99['with'] / p99['without']:.2f}.",
        "p99_ms": p99,
        "publish_s": seconds,
    }


class _Publisher:
    """Publishes and makes live, and notes how long it takes."""

    def __init__(self, context: Context, prepared: adapters.Prepared, client: Client):
        self._store, self._client = prepared.store, client
        self._adapters = itertools.cycle([adapters.random_adapter(context.config, RANK, 1000 + seed) for seed in range(DIFFERENT)])
        self.seconds: list[float] = []

    def publish(self) -> None:
        adapter, begin = next(self._adapters), time.monotonic()
        publish(adapter, NAME, self._store)
        self._client.load_adapters()
        self.seconds.append(time.monotonic() - begin)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Every EVERY_S seconds, from a thread of its own, while the block runs. What fails there is raised when the block ends."""
        over = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(self._again_and_again, over)
            try:
                yield
            finally:
                over.set()
        done.result()

    def _again_and_again(self, over: threading.Event) -> None:
        while not over.is_set():
            begin = time.monotonic()
            self.publish()
            over.wait(max(0.0, begin + EVERY_S - time.monotonic()))


def _requests(context: Context, names: list[str], repetition: int, kind: str) -> list[Request]:
    made = (context.prompts.make(PROMPT, repetition + 1, len(kind), index) for index in range(2 * STREAMS))
    streams = [NAME, *names[: STREAMS - 1]]
    return [Request(ids, text, ANSWER, streams[index % STREAMS]) for index, (ids, text) in enumerate(made)]
