"""Many adapters on disk, asked for by Zipf's law. Device slots and host cache hold fewer, so the curve crosses both."""

import dataclasses
import shutil
from typing import Any

from bench import adapters, measure as arithmetic
from bench.scenarios.context import Context
from bench.worker import Request
from bench.workloads import zipf

PROMPT, ANSWER, STREAMS = 64, 64, 16
REQUESTS = 160
RANK = 8
LORA_SLOTS, HOST_ADAPTERS = 24, 96


def measure(context: Context) -> dict[str, Any]:
    size = adapters.random_adapter(context.config, RANK, 0, adapters.BFLOAT16).nbytes
    settings = context.settings_of(lora_slots=LORA_SLOTS, adapter_host_cache_bytes=HOST_ADAPTERS * size)
    cache = context.cache / "zipf"
    try:
        points = [_point(context, settings, cache, count) for count in sorted(context.options.counts)]
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    first = next((point for point in points if point["adapters"] >= 8), points[0])
    rows = [
        [
            point["adapters"], f"{arithmetic.Spread(**point['output']):.0f}",
            f"{point['output']['median'] / first['output']['median']:.2f}", f"{point['ttft_p95_ms']:.0f}", point["placed"],
            f"{point['memory_bytes'] / 2**20:.0f}",
        ]
        for point in points
    ]  # fmt: skip
    return {
        "title": f"Adapters on disk, Zipf traffic: {STREAMS} streams of {PROMPT}/{ANSWER}, engine alone, {context.dtype}",
        "columns": ["adapters", "whole answers, tokens/s", f"over {first['adapters']} adapters", "TTFT p95, ms", "placed on the device", "MiB"],
        "rows": rows,
        "note": f"Rank {RANK}, all linear layers, {size / 2**20:.1f} MiB each; {LORA_SLOTS} on the device and {HOST_ADAPTERS} in host memory at a time. "
        f"{REQUESTS} requests a repetition, another draw each; nothing is loaded before the first.",
        "points": points,
    }


def _point(context: Context, settings: Any, cache: Any, count: int) -> dict[str, Any]:
    context.say(f"  {count} adapters")
    prepared = adapters.prepare(cache, context.config, settings, [RANK] * count, adapters.BFLOAT16)
    runs, memory = [], 0
    with context.systems(["engine"], prepared, settings) as session:
        for repetition in range(context.options.repeat):
            drawn = zipf(prepared.names, REQUESTS, repetition)
            prompts = [context.prompts.make(PROMPT, count, repetition, index) for index in range(REQUESTS)]
            requests = [Request(ids, text, ANSWER, name) for (ids, text), name in zip(prompts, drawn)]
            answers, used = session.turn("engine", requests, STREAMS)
            runs.append(arithmetic.run_of(answers, PROMPT * REQUESTS))
            memory = max(memory, used["memory_bytes"])
        placed = session.running["engine"].worker.call("load")["adapters_placed"]
    return {
        "adapters": count,
        "output": dataclasses.asdict(arithmetic.Spread.of(run.output for run in runs)),
        "ttft_p95_ms": arithmetic.percentile([value * 1e3 for run in runs for value in run.ttft], 95),
        "placed": placed,
        "memory_bytes": memory,
    }
