"""The first token of a request whose adapter is on the device, in host memory, or on disk; alone, and beside others that generate."""

import shutil
from typing import Any

from bench import adapters, measure as arithmetic
from bench.scenarios.context import Context
from bench.worker import Answer, Request

PROMPT, RANK = 64, 16
LORA_SLOTS, HOST_ADAPTERS = 4, 20
ON_DEVICE, IN_HOST, ON_DISK = 1, 8, 24
"""Adapters that are asked for in turns, one of each kind after the other: the second kind always has left the device, the third the host's
cache too."""
OTHERS, LONG = 3, 700


def measure(context: Context) -> dict[str, Any]:
    counts = {"device": ON_DEVICE, "host memory": IN_HOST, "disk": ON_DISK}
    size = adapters.random_adapter(context.config, RANK, 0).nbytes
    settings = context.settings_of(lora_slots=LORA_SLOTS, adapter_host_cache_bytes=HOST_ADAPTERS * size)
    cache = context.cache / "tiers"
    systems = [name for name in ("engine", "triton") if name in context.options.systems]
    rows = []
    try:
        prepared = adapters.prepare(cache, context.config, settings, [RANK] * sum(counts.values()))
        with context.systems(systems, prepared, settings) as session:
            for name in systems:
                for others in (0, OTHERS):
                    found: dict[str, list[float]] = {tier: [] for tier in counts}
                    for repetition in range(-1, context.options.repeat):
                        probes = _probes(context, prepared.names, counts, (others, repetition + 1))
                        beside = [Request(*context.prompts.make(PROMPT, others, repetition + 1, index, LONG), LONG) for index in range(others)]
                        answers, _ = session.turn(name, beside + probes, 1 + others)
                        if repetition >= 0:
                            _note(found, answers[:others], answers[others:])
                    device = arithmetic.Spread.of(found["device"]).median
                    rows += [
                        [f"{name}, {others} others", tier, f"{arithmetic.Spread.of(times):.0f}", f"{arithmetic.Spread.of(times).median - device:.0f}"]
                        for tier, times in found.items()
                    ]
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return {
        "title": f"Where the adapter lies: time to first token, prompt {PROMPT}, rank {RANK}, {size / 2**20:.0f} MiB on disk, {context.dtype}",
        "columns": ["", "adapter", "ms", "median over the device's"],
        "rows": rows,
        "note": f"Others generate on the base model. Files are in the system's page cache. {ON_DISK} requests of each kind a repetition.",
    }


def _probes(context: Context, names: list[str], counts: dict[str, int], key: tuple[int, int]) -> list[Request]:
    """Answers of one token, a kind after the other."""
    requests = []
    for turn in range(ON_DISK):
        first = 0
        for number, count in enumerate(counts.values()):
            ids, text = context.prompts.make(PROMPT, *key, turn, number)
            requests.append(Request(ids, text, 1, names[first + turn % count]))
            first += count
    return requests


def _note(found: dict[str, list[float]], others: list[Answer], probes: list[Answer]) -> None:
    """Milliseconds to first tokens, of the requests that the others were beside to the end."""
    until = min((answer.events[-1][0] for answer in others), default=float("inf"))
    for number, answer in enumerate(probes):
        if answer.events[0][0] <= until:
            list(found.values())[number % len(found)].append((answer.events[0][0] - answer.sent) * 1e3)
