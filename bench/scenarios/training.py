"""Training steps: this project's script and a plain loop of PEFT and torch, on the same examples, in turns.

Each turn is a process of its own that makes a few steps; the first of them compile or warm up and do not count.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
from typing import Any

from bench import measure as arithmetic
from bench.drivers import DRIVERS
from bench.scenarios.context import Context
from bench.worker import DriverFailed, Unsupported, Worker
from server.repository import PROJECT

BATCH, LENGTH, RANK = 4, 256, 16
STEPS, WARM_UP = 6, 2
DTYPES = ("float32", "bfloat16")
LEARNING_RATE = 3e-4
DROPOUTS = (0.0, 0.05)  # as people use LoRA


def measure(context: Context) -> dict[str, Any]:
    texts = [context.prompts.make(LENGTH - 1, index, LENGTH)[1] for index in range(BATCH * STEPS)]
    data = context.folder / "training.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    system = DRIVERS["peft"]
    python = context.options.python.get("peft", str(PROJECT / system.python))
    has_peer = "peft" in context.options.systems and ((PROJECT / system.needs).exists() or "peft" in context.options.python)
    rows, found, notes = [], {}, []
    dtypes = [dtype for dtype in context.options.dtypes if dtype in DTYPES]
    for dtype, dropout in itertools.product(dtypes, DROPOUTS):
        case = f"{dtype}, dropout {dropout}" if dropout else dtype
        speeds: dict[str, list[float]] = {"ours": [], "peft": []}
        for turn in range(context.options.repeat):
            speeds["ours"].append(_ours(context, data, dtype, dropout, turn))
            if has_peer:
                try:
                    speeds["peft"].append(_theirs(context, python, texts, dtype, dropout))
                except (DriverFailed, Unsupported) as error:
                    has_peer = False
                    notes.append(f" PEFT failed ({case}): {error}.")
            context.say(f"  {case}: " + ", ".join(f"{name} {values[-1]:.0f}" for name, values in speeds.items() if values))
        found[case] = speeds
        ours = arithmetic.Spread.of(speeds["ours"])
        row = [case, f"{ours:.0f}", "", ""]
        if len(speeds["peft"]) == len(speeds["ours"]):
            theirs, ratio = arithmetic.Spread.of(speeds["peft"]), arithmetic.ratio(speeds["ours"], speeds["peft"])
            row[2:] = [f"{theirs:.0f}", f"{ratio:.2f}"]
        rows.append(row)
    return {
        "title": f"Training, tokens/s: rank {RANK}, all linear layers, batch {BATCH} x {LENGTH}, AdamW",
        "columns": ["", "training.sft", "PEFT + torch", "ratio"],
        "rows": rows,
        "note": f"Median of {STEPS - WARM_UP} steps after {WARM_UP}. In bfloat16 PEFT runs under autocast, over float32 weights." + "".join(notes),
        "speeds": found,
    }


def _ours(context: Context, data: Any, dtype: str, dropout: float, turn: int) -> float:
    run = run_sft(context, f"training-{dtype}-{dropout}-{turn}", data, STEPS, dtype, dropout)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line["tokens_per_second"] for line in lines if "tokens_per_second" in line][WARM_UP:])


def run_sft(context: Context, name: str, data: pathlib.Path, steps: int, dtype: str, dropout: float = 0.0) -> pathlib.Path:
    """The run folder of `training.sft` with so many steps on the texts of a JSONL file.

    Raises:
        DriverFailed: it ended with an error.
    """
    run = context.folder / name
    shutil.rmtree(run, ignore_errors=True)  # of a benchmark before, which would be continued
    options = {
        "data": data, "name": "bench/trained", "run": run, "max-steps": steps, "batch-size": BATCH, "micro-batch-size": BATCH,
        "max-length": LENGTH, "buckets": 1, "rank": RANK, "alpha": 2 * RANK, "lr": LEARNING_RATE, "schedule": "constant", "warmup": 0, "dtype": dtype,
        "dropout": dropout,
    }  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environ = dataclasses.replace(context.settings, dtype=dtype).environment()
    with (context.folder / "training.log").open("ab") as log:
        command = [sys.executable, "-m", "training.sft", *arguments, "--no-publish"]
        code = subprocess.run(command, cwd=PROJECT, stdout=log, stderr=log, env={**os.environ, **environ}).returncode
    if code:
        raise DriverFailed(f"training.sft ended with {code}; its log is {log.name}")
    return run


def _theirs(context: Context, python: str, texts: list[str], dtype: str, dropout: float) -> float:
    worker = Worker("peft", python, DRIVERS["peft"].module, context.folder / "training-peft.log", PROJECT)
    try:
        arguments = {"model": str(context.model), "texts": texts, "dtype": dtype, "batch": BATCH, "rank": RANK, "lr": LEARNING_RATE}
        seconds = worker.call("train", dropout=dropout, **arguments)
    finally:
        worker.stop()
    return BATCH * LENGTH / statistics.median(seconds[WARM_UP:])

