"""What the path through Triton costs: the engine alone, the server with streaming and without, in turns."""

import statistics
from typing import Any

from bench import adapters, measure as arithmetic
from bench.scenarios.context import Context
from bench.workloads import Row

ROW = Row(64, 64, 16, "mixed")


def measure(context: Context) -> dict[str, Any]:
    settings = context.settings_of()
    prepared = adapters.prepare(context.cache, context.config, settings, adapters.sixteen())
    ways: dict[str, list[arithmetic.Run]] = {"engine alone": [], "through Triton, streamed": [], "through Triton, in one piece": []}
    with context.systems(["engine", "triton"], prepared, settings) as session:
        for repetition in range(-1, context.options.repeat):
            for place, (way, runs) in enumerate(ways.items()):
                # New prompts each time, so that no way finds in the prefix cache what another one asked.
                requests = context.prompts.requests(ROW, prepared.names, (repetition + 1) * len(ways) + place)
                system = "engine" if way == "engine alone" else "triton"
                if system == "triton":
                    session.running["triton"].worker.call("set_stream", stream="streamed" in way)
                answers, _ = session.turn(system, requests, ROW.streams)
                if repetition >= 0:
                    runs.append(arithmetic.run_of(answers, ROW.prompt * ROW.streams))
    alone = ways["engine alone"]
    rows = []
    for way, runs in ways.items():
        output = arithmetic.Spread.of(run.output for run in runs)
        share = arithmetic.ratio([run.output for run in runs], [run.output for run in alone])
        streamed = way != "through Triton, in one piece"
        ttft = statistics.fmean(value for run in runs for value in run.ttft) * 1e3
        rows.append([way, f"{output.median:.0f}", f"{share:.2f}", f"{ttft:.0f}" if streamed else ""])
    return {
        "title": f"Through Triton and without: {ROW}, {context.dtype}",
        "columns": ["", "whole answers, tokens/s", "over engine alone", "mean time to first token, ms"],
        "rows": rows,
    }
