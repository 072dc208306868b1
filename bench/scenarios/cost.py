"""What adapters cost: one stream with an adapter and 16 streams on 16 adapters, of the cache's type and in 8 bits, each in turns with as
many streams on the base model, the engine alone and through Triton."""

from typing import Any

from bench import adapters, measure as arithmetic
from bench.drivers import DRIVERS
from bench.scenarios.context import Context
from bench.workloads import Row

PAIRS = [(Row(64, 64, 1, "base"), Row(64, 64, 1, "one")), (Row(64, 64, 16, "base"), Row(64, 64, 16, "mixed"))]


def measure(context: Context) -> dict[str, Any]:
    settings = {name: context.settings_of(lora_quantization=name, prompt_lookup_tokens=0) for name in ("none", "int8")}
    prepared = adapters.prepare(context.cache, context.config, settings["none"], adapters.sixteen())
    ours = [name for name in context.options.systems if DRIVERS[name].ours]
    with context.systems(ours, prepared, settings["none"]) as wide, context.systems(ours, prepared, settings["int8"]) as narrow:
        ways = {
            way: (session, row, str(base))
            for base, adapted in PAIRS
            for way, session, row in ((str(base), wide, base), (str(adapted), wide, adapted), (f"{adapted} in 8 bits", narrow, adapted))
        }
        speeds: dict[str, dict[str, list[float]]] = {system: {way: [] for way in ways} for system in ours}
        for repetition in range(-1, context.options.repeat):
            for place, (way, (session, row, _)) in enumerate(ways.items()):
                # New prompts each time, so that nothing is found in the prefix cache.
                requests = context.prompts.requests(row, prepared.names, (repetition + 1) * len(ways) + place)
                for system in ours:
                    answers, _ = session.turn(system, requests, row.streams)
                    if repetition >= 0:
                        speeds[system][way].append(arithmetic.run_of(answers, row.prompt * row.streams).decode)
    rows = []
    for system, of_way in speeds.items():
        for way, (_, _, base) in ways.items():
            share = arithmetic.ratio(of_way[way], of_way[base])
            rows.append([f"{way}, {DRIVERS[system].title}", f"{arithmetic.Spread.of(of_way[way]):.0f}", f"{share:.2f}"])
    return {
        "title": f"What adapters cost, {context.dtype}",
        "columns": ["prompt/answer", "decode, tokens/s", "over the base model"],
        "rows": rows,
        "speeds": speeds,
    }
