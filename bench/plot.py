"""Draws the decode speeds of a `results.json`: `python -m bench.plot results.json results.png`. Needs Matplotlib, and nothing of ours."""

import json
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from bench.drivers import DRIVERS  # noqa: E402

COLOURS = {"engine": "#1b5e20", "triton": "#66bb6a", "llama": "#ef6c00", "vllm": "#1565c0", "peft": "#8e24aa"}
MIXES = {"base": "base", "one": "1 adapter", "mixed": "16 adapters"}


def main() -> None:
    source, target = sys.argv[1:]
    with open(source) as file:
        results = json.load(file)
    precisions = {dtype: found["rows"] for dtype, found in results["precisions"].items() if found["rows"]}
    if not precisions:
        return
    figure, axes = plt.subplots(len(precisions), 1, figsize=(11, 3.6 * len(precisions)), squeeze=False)
    for axis, (dtype, rows) in zip(axes[:, 0], precisions.items()):
        draw(axis, [row for row in rows if row["answer"] > 1])
        axis.set_title(dtype)
        axis.set_ylabel("decode, tokens/s")
    machine = results["machine"]
    figure.suptitle(f"{results['model']}, {machine['cpu']}, {machine['cores']} cores, {results['when']}", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def draw(axis: "plt.Axes", rows: list[dict]) -> None:
    """Grouped bars, one group a row, with the spread of the repetitions."""
    names = [name for name in DRIVERS if any("decode" in row["systems"].get(name, {}) for row in rows)]
    width = 0.8 / max(len(names), 1)
    for place, name in enumerate(names):
        found = [(index, row["systems"][name]["decode"]) for index, row in enumerate(rows) if "decode" in row["systems"].get(name, {})]
        where = [index + (place - (len(names) - 1) / 2) * width for index, _ in found]
        medians = [speed["median"] for _, speed in found]
        errors = [[speed["median"] - speed["low"] for _, speed in found], [speed["high"] - speed["median"] for _, speed in found]]
        axis.bar(where, medians, width, yerr=errors, capsize=2, color=COLOURS[name], label=DRIVERS[name].title)
    labels = [f"{row['prompt']}/{row['answer']}\n{row['streams']} x\n{MIXES[row['mix']]}" for row in rows]
    axis.set_xticks(range(len(rows)), labels, fontsize=7)


if __name__ == "__main__":
    main()
