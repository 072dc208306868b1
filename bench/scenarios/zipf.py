"""Many adapters on disk, asked for by Zipf's law, and in turns a few of them by another engine. Device slots and host cache hold fewer, so the
curve crosses both."""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from bench import adapters, measure as arithmetic
from bench.scenarios.context import Context
from bench.session import Session
from bench.worker import Request
from bench.workloads import zipf
from jaxlora.settings import Settings

PROMPT, ANSWER, STREAMS = 64, 64, 16
REQUESTS = 160
RANK = 8
FEW = 8
LORA_SLOTS, HOST_ADAPTERS = 24, 96


def measure(context: Context) -> dict[str, Any]:
    size = adapters.random_adapter(context.config, RANK, 0, adapters.BFLOAT16).nbytes
    settings = context.settings_of(lora_slots=LORA_SLOTS, adapter_host_cache_bytes=HOST_ADAPTERS * size)
    cache = context.cache / "zipf"
    try:
        with _Traffic.over(context, settings, cache / "few", FEW) as beside:
            points = [_point(context, settings, cache / "many", count, beside) for count in sorted(context.options.counts)]
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    rows = [
        [
            point["adapters"], *(f"{arithmetic.Spread(**point[name]):.{digits}f}" for name, digits in (("output", 0), ("beside", 0), ("ratio", 2))),
            f"{point['ttft_p95_ms']:.0f}", point["placed"], f"{point['memory_bytes'] / 2**20:.0f}",
        ]
        for point in points
    ]  # fmt: skip
    return {
        "title": f"Adapters on disk, Zipf traffic: {STREAMS} streams of {PROMPT}/{ANSWER}, engine alone, {context.dtype}",
        "columns": ["adapters", "whole answers, tokens/s", f"{FEW} adapters, in turns", "ratio", "TTFT p95, ms", "placed on the device", "MiB"],
        "rows": rows,
        "note": f"Rank {RANK}, all linear layers, {size / 2**20:.1f} MiB each; {LORA_SLOTS} on the device and {HOST_ADAPTERS} in host memory at a time. "
        f"{REQUESTS} requests a repetition, another draw each; nothing is loaded before the first.",
        "points": points,
    }


@dataclasses.dataclass
class _Traffic:
    """Repetitions of one engine with so many adapters."""

    context: Context
    session: Session
    names: list[str]
    runs: list[arithmetic.Run] = dataclasses.field(default_factory=list)
    memory: int = 0

    @classmethod
    @contextlib.contextmanager
    def over(cls, context: Context, settings: Settings, folder: pathlib.Path, count: int) -> Iterator["_Traffic"]:
        prepared = adapters.prepare(folder, context.config, settings, [RANK] * count, adapters.BFLOAT16)
        with context.systems(["engine"], prepared, settings) as session:
            yield cls(context, session, prepared.names)

    def turn(self) -> None:
        repetition, count = len(self.runs), len(self.names)
        prompts = [self.context.prompts.make(PROMPT, count, repetition, index) for index in range(REQUESTS)]
        requests = [Request(ids, text, ANSWER, name) for (ids, text), name in zip(prompts, zipf(self.names, REQUESTS, repetition))]
        answers, used = self.session.turn("engine", requests, STREAMS)
        self.runs.append(arithmetic.run_of(answers, PROMPT * REQUESTS))
        self.memory = max(self.memory, used["memory_bytes"])

    def placed(self) -> int:
        return self.session.running["engine"].worker.call("load")["adapters_placed"]


def _point(context: Context, settings: Settings, folder: pathlib.Path, count: int, beside: _Traffic) -> dict[str, Any]:
    context.say(f"  {count} adapters")
    with _Traffic.over(context, settings, folder, count) as traffic:
        for _ in range(context.options.repeat):
            beside.turn()
            traffic.turn()
        placed = traffic.placed()
    speeds, others = ([run.output for run in runs] for runs in (traffic.runs, beside.runs[-context.options.repeat :]))
    return {
        "adapters": count,
        "output": dataclasses.asdict(arithmetic.Spread.of(speeds)),
        "beside": dataclasses.asdict(arithmetic.Spread.of(others)),
        "ratio": dataclasses.asdict(arithmetic.ratio(speeds, others)),
        "ttft_p95_ms": arithmetic.percentile([value * 1e3 for run in traffic.runs for value in run.ttft], 95),
        "placed": placed,
        "memory_bytes": traffic.memory,
    }
