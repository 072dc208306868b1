"""What adapters cost: one stream with an adapter and 16 streams on 16 adapters, of the cache's type and in 8 bits, each in turns with as
many streams on the base model, the engine alone and through Triton."""

from typing import Any

from bench import adapters, measure as arithmetic
from bench.drivers import DRIVERS
from bench.scenarios.context import Context
from bench.workloads import MIXES, Row

ONE, MANY = Row(64, 64, 1, "one"), Row(64, 64, 16, "mixed")
OF_BASE = {ONE: Row(64, 64, 1, "base"), MANY: Row(64, 64, 16, "base")}


def measure(context: Context) -> dict[str, Any]:
    settings = {name: context.settings_of(lora_quantization=name, prompt_lookup_tokens=0) for name in ("none", "int8")}
    prepared = adapters.prepare(context.cache, context.config, settings["none"], adapters.sixteen())
    ours = [name for name in context.options.systems if DRIVERS[name].ours]
    with context.systems(ours, prepared, settings["none"]) as wide, context.systems(ours, prepared, settings["int8"]) as narrow:
        ways = [(session, row, session is narrow) for adapted, base in OF_BASE.items() for session, row in ((wide, base), (wide, adapted), (narrow, adapted))]
        speeds: dict[str, dict[str, list[float]]] = {system: {title(row, quantized): [] for _, row, quantized in ways} for system in ours}
        for repetition in range(-1, context.options.repeat):
            for place, (session, row, quantized) in enumerate(ways):
                # New prompts each time, so that nothing is found in the prefix cache.
                requests = context.prompts.requests(row, prepared.names, (repetition + 1) * len(ways) + place)
                for system in ours:
                    answers, _ = session.turn(system, requests, row.streams)
                    if repetition >= 0:
                        speeds[system][title(row, quantized)].append(arithmetic.run_of(answers, row.prompt * row.streams).decode)
    rows = []
    for system, of_way in speeds.items():
        for _, row, quantized in ways:
            values, base = of_way[title(row, quantized)], of_way[title(OF_BASE.get(row, row), False)]
            rows.append([f"{title(row, quantized)}, {DRIVERS[system].title}", f"{arithmetic.Spread.of(values):.0f}", f"{arithmetic.ratio(values, base):.2f}"])
    return {
        "title": f"What adapters cost, prompt 64, answer 64, {context.dtype}",
        "columns": ["", "decode, tokens/s", "over the base model"],
        "rows": rows,
        "speeds": speeds,
    }


def title(row: Row, quantized: bool) -> str:
    return f"{row.streams} stream{'s' * (row.streams > 1)}, {MIXES[row.mix]}{' in 8 bits' * quantized}"
