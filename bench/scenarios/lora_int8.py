"""Adapters in 8 bits beside adapters in the type of the cache: 16 streams on the base model and on 16 adapters, the engine alone and
through Triton, in turns."""

from typing import Any

from bench import adapters, measure as arithmetic
from bench.drivers import DRIVERS
from bench.scenarios.context import Context
from bench.workloads import Row

BASE, MIXED = Row(64, 64, 16, "base"), Row(64, 64, 16, "mixed")
BASE_WAY = "base model"


def measure(context: Context) -> dict[str, Any]:
    settings = {name: context.settings_of(lora_quantization=name, prompt_lookup_tokens=0) for name in ("none", "int8")}
    prepared = adapters.prepare(context.cache, context.config, settings["none"], adapters.sixteen())
    ours = [name for name in context.options.systems if DRIVERS[name].ours]
    with context.systems(ours, prepared, settings["none"]) as wide, context.systems(ours, prepared, settings["int8"]) as narrow:
        ways = {BASE_WAY: (wide, BASE), "16 adapters": (wide, MIXED), "16 adapters in 8 bits": (narrow, MIXED)}
        speeds: dict[str, dict[str, list[float]]] = {system: {way: [] for way in ways} for system in ours}
        for repetition in range(-1, context.options.repeat):
            for place, (way, (session, row)) in enumerate(ways.items()):
                # New prompts each time, so that nothing is found in the prefix cache.
                requests = context.prompts.requests(row, prepared.names, (repetition + 1) * len(ways) + place)
                for system in ours:
                    answers, _ = session.turn(system, requests, row.streams)
                    if repetition >= 0:
                        speeds[system][way].append(arithmetic.run_of(answers, row.prompt * row.streams).decode)
    rows = []
    for system, by_way in speeds.items():
        for way, values in by_way.items():
            speed, share = arithmetic.Spread.of(values), arithmetic.ratio(values, by_way[BASE_WAY])
            rows.append([f"{way}, {DRIVERS[system].title}", f"{speed:.0f}", f"{share:.2f}"])
    return {
        "title": f"Adapters in 8 bits: 16 streams, {context.dtype}",
        "columns": ["", "decode, tokens/s", "over the base model"],
        "rows": rows,
        "speeds": speeds,
    }
