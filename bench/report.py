"""Results as JSON for machines and as Markdown for people. Knows the shape of the results, and measures nothing."""

import json
import math
import pathlib
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench import measure
from bench.drivers import DRIVERS
from bench.workloads import WEIGHT_BYTES, Row
from server.repository import PROJECT

BUSY_ELSEWHERE = 0.05
PLOT_PYTHON = PROJECT / ".venv-bench" / "bin" / "python"


def write(folder: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes `results.json` and `results.md`."""
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    (folder / "results.md").write_text(markdown(results))


def plot(folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Draws `results.png`, where the environment for it is there."""
    if not PLOT_PYTHON.exists():
        say("no plot: `make bench` installs what draws it")
        return
    command = [PLOT_PYTHON, "-m", "bench.plot", folder / "results.json", folder / "results.png"]
    if subprocess.run(command, cwd=PROJECT).returncode:
        say("the plot could not be drawn")


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [_machine(results)]
    for dtype, found in results["precisions"].items():
        parts.append(f"## {dtype}")
        parts += _precision(dtype, found, results)
    for scenario in results["scenarios"].values():
        found = table(scenario["columns"], scenario["rows"]) if scenario["rows"] else ""
        parts += [f"## {scenario['title']}", found, scenario.get("note", "")]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def bound(results: Mapping[str, Any], dtype: str) -> float:
    """Tokens/s of one stream that reads every weight once a token at the memory bandwidth of the run."""
    return results["limits"]["read_bytes_per_s"] / (results["weights_per_token"] * WEIGHT_BYTES[dtype])


def ratios(row: Mapping[str, Any], ours: str) -> dict[str, measure.Spread]:
    """One of our systems over each peer, turn by turn, by peer. Answers of one token have no speed of decoding, nor have those of streams
    that never generate together: there the whole answers count."""
    systems = row["systems"]
    if "turns" not in systems.get(ours, {}):
        return {}
    def ratio(peer: str) -> measure.Spread:
        together = all(systems[name]["together"] for name in (ours, peer))
        metric = "prefill" if row["answer"] == 1 else "decode" if together else "output"
        return measure.ratio(*([turn[metric] for turn in systems[name]["turns"]] for name in (ours, peer)))

    return {name: ratio(name) for name, found in systems.items() if "turns" in found and not DRIVERS[name].ours}


def _machine(results: Mapping[str, Any]) -> str:
    machine, limits = results["machine"], results["limits"]
    gemm = "; ".join(
        f"{dtype} {max(found.values()) / 1e9:.0f} ({', '.join(f'{name} {speed / 1e9:.0f}' for name, speed in found.items())})"
        for dtype, found in limits["gemm"].items()
        if found
    )
    return "\n".join(
        [
            "# Benchmark", "",
            f"- {results['when']}, commit `{results['commit']}`, model `{results['model']}`; `python -m bench {results['command']}`",
            f"- {machine['cpu']}, {machine['cores']} cores, {', '.join(machine['features'])}, {machine['memory_bytes'] / 2**30:.0f} GiB; {machine['system']}",
            f"- measured in this run: memory is read at {limits['read_bytes_per_s'] / 1e9:.1f} GB/s; large matrix products, GFLOP/s: {gemm}",
            "- figures are the median of the repetitions, with the lowest and the highest; repetitions of all systems take turns",
        ]
    )  # fmt: skip


def _precision(dtype: str, found: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    systems, rows = found["systems"], found["rows"]
    names = [name for name in DRIVERS if name in systems]
    titles = [DRIVERS[name].title for name in names]
    label = lambda row: str(Row(**{key: row[key] for key in ("prompt", "answer", "streams", "mix")}))

    def section(title: str, cell: Callable[[Mapping[str, Any]], str]) -> list[str]:
        lines = [[label(row), *(_cell(row["systems"].get(name), cell) for name in names)] for row in rows]
        return [f"**{title}**", table(["prompt/answer", *titles], lines)]

    limit = bound(results, dtype)
    parts = [
        "\n".join(f"- {DRIVERS[name].title}: {_system(systems[name])}; {DRIVERS[name].note}" for name in names),
        *section("Decode, tokens/s (\\*: the streams never all generate together; then from the first token to the last)", _decode),
        f"One stream that reads every weight once a token, {8 * WEIGHT_BYTES[dtype]:g} bits each: at most {limit:.0f} tokens/s at the memory bandwidth of this run."
        + (" With AMX this server keeps them in 12 bits." if "amx_bf16" in results["machine"]["features"] and dtype == "bfloat16" else ""),
        *_ratio_section(rows, names, label),
        *section("Whole answers, tokens/s (from the first request to the last token)", lambda it: _spread(it["output"])),
        *section("Prompts, tokens/s (until every stream has its first token)", lambda it: _spread(it["prefill"])),
        *section("Time to first token, ms (mean / p95)", lambda it: f"{it['ttft_ms']['mean']:.0f} / {it['ttft_ms']['p95']:.0f}"),
        *section("Time per output token, ms (p50 / p99)", _token_times),
        *section("Memory, MiB (all processes of the system)", lambda it: f"{it['memory_bytes'] / 2**20:.0f}"),
        *section("Greedy tokens equal to a reference, up to the first that differs", _agreement),
    ]
    busy = max((it["elsewhere"] for row in rows for it in row["systems"].values() if "elsewhere" in it), default=0.0)
    if busy > BUSY_ELSEWHERE:
        parts.append(f"**Something else used up to {busy:.0%} of the machine during a repetition; these figures are not to be relied on.**")
    return parts


def _ratio_section(rows: Sequence[Mapping[str, Any]], names: Sequence[str], label: Callable[[Mapping[str, Any]], str]) -> list[str]:
    peers = [name for name in names if not DRIVERS[name].ours]
    parts = []
    for ours in (name for name in names if DRIVERS[name].ours):
        lines = []
        for row in rows:
            found = ratios(row, ours)
            best = min(found.values(), key=lambda spread: spread.median, default=None)
            cells = [f"{found[peer]:.2f}" if peer in found else "" for peer in peers]
            lines.append([label(row), *cells, f"{best.median:.2f}" if best else ""])
        if any(any(line[1:]) for line in lines):
            title = (
                f"**Decode speed {DRIVERS[ours].title}, as a multiple of each peer's (turn by turn; of prompts where an answer is one token, of whole"
                " answers where the streams of one of the two never all generate together)**"
            )
            parts += [title, table(["prompt/answer", *(f"over {DRIVERS[peer].title}" for peer in peers), "over the best"], lines)]
    return parts


def _cell(found: Mapping[str, Any] | None, cell: Callable[[Mapping[str, Any]], str]) -> str:
    if found is None:
        return ""
    return "can't" if "cannot" in found else cell(found)


def _decode(found: Mapping[str, Any]) -> str:
    return _spread(found["decode"]) + ("" if found["together"] or math.isnan(found["decode"]["median"]) else " \\*")


def _token_times(found: Mapping[str, Any]) -> str:
    p50, p99 = found["tpot_ms"]["p50"], found["tpot_ms"]["p99"]
    return "" if math.isnan(p50) else f"{p50:.1f} / {p99:.1f}"


def _spread(spread: Mapping[str, float]) -> str:
    if math.isnan(spread["median"]):
        return ""
    digits = 0 if spread["median"] >= 100 else 1
    return f"{measure.Spread(**spread):.{digits}f}"


def _agreement(found: Mapping[str, Any]) -> str:
    agreement = found.get("agreement")
    return f"{agreement['share']:.0%} of {DRIVERS[agreement['with']].title}" if agreement else ""


def _system(found: Mapping[str, Any]) -> str:
    if "missing" in found:
        return found["missing"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{versions}; started in {found['start_s']:.1f} s"
