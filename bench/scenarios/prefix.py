"""A long prompt that comes again: time to first token, over that of one that never came before."""

import statistics
from typing import Any

from bench import adapters
from bench.scenarios.context import Context
from bench.worker import Request

PREFIX, REST, ANSWER = 512, 16, 4


def measure(context: Context) -> dict[str, Any]:
    settings = context.settings_of()
    prepared = adapters.prepare(context.cache, context.config, settings, adapters.sixteen())
    found: dict[str, list[float]] = {"cold": [], "repeated": []}
    with context.systems(["engine"], prepared, settings) as session:
        for repetition in range(-1, context.options.repeat):
            prefix, text = context.prompts.make(PREFIX, repetition + 1, PREFIX)
            for index, kind in enumerate(found):
                rest, more = context.prompts.make(REST, repetition + 1, index)
                [answer], _ = session.turn("engine", [Request(prefix + rest, text + more, ANSWER, prepared.names[0])], 1)
                if repetition >= 0:
                    found[kind].append((answer.events[0][0] - answer.sent) * 1e3)
    medians = {kind: statistics.median(values) for kind, values in found.items()}
    return {
        "title": f"A prefix of {PREFIX} tokens that comes again: one stream, one adapter, engine alone, {context.dtype}",
        "columns": ["", "time to first token, ms", "over cold"],
        "rows": [[kind, f"{value:.0f}", f"{value / medians['cold']:.2f}"] for kind, value in medians.items()],
        "ttft_ms": found,
    }
