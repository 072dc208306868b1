"""Runs the benchmark and writes its results: `python -m bench --help`.

Writes `results.json`, `results.md` and `results.png` into a new folder below `runs/bench/`, or into `--out`.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

from bench import adapters, machine, report, scenarios
from bench.drivers import DRIVERS
from bench.gguf_files import NoGguf, write_adapter, write_model
from bench.session import Session
from bench.worker import GREEDY, DriverFailed, Unsupported
from bench.workloads import MIXES, PRECISIONS, Prompts, rows
from jaxlora import allocator
from jaxlora.checkpoint import resolve
from jaxlora.config import ModelConfig
from jaxlora.settings import Settings
from jaxlora.text import Tokenizer
from server.repository import PROJECT


def main() -> None:
    options = parse()
    folder = options.out or PROJECT / "runs" / "bench" / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    say = lambda line: print(f"[{time.monotonic() - begin:5.0f} s] {line}", flush=True)
    settings = Settings.read()
    model = resolve(settings.model, settings.cache_dir, say)
    cache = adapters.cache_of(settings, model)
    config = ModelConfig.from_folder(model)
    prompts = Prompts(Tokenizer.from_folder(model), options.sampling)
    say("preparing adapters")
    prepared = adapters.prepare(cache, config, settings, adapters.sixteen())
    say("measuring the machine")
    environ = allocator.environment(os.environ)  # as the systems have it
    limits = json.loads(subprocess.run([sys.executable, "-m", "bench.machine"], cwd=PROJECT, capture_output=True, check=True, text=True, env=environ).stdout)
    results: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "command": " ".join(sys.argv[1:]), "commit": commit(),
        "machine": machine.describe(), "model": settings.model, "weights_per_token": weights_per_token(config),
        "limits": {"read_bytes_per_s": limits["read_bytes_per_s"], "gemm": {"float32": {"numpy": limits["gemm_float32"]}, "bfloat16": {}, "int8": {}}},
        "precisions": {}, "scenarios": {},
    }  # fmt: skip
    asked = rows(options.shapes, options.streams, options.mixes)
    for dtype in options.dtypes if asked else ():
        say(f"{dtype}: {len(asked)} rows, {options.repeat} repetitions")
        # Nobody guesses tokens here: these are the speeds of the model. Scenario `lookup` has guesses.
        chosen = dataclasses.replace(settings, **PRECISIONS[dtype], prompt_lookup_tokens=0)
        setup = make_setup(chosen, dtype, model, config, prepared, cache if "llama" in options.systems else None, say)
        with Session(setup, options.python, folder, say).systems(options.systems) as session:
            found = {"systems": session.describe(), "rows": []}
            results["precisions"][dtype] = found
            measure_gemm(session, results["limits"]["gemm"])
            for row in asked:
                found["rows"].append(session.row(row, prompts, prepared.names, options.repeat))
                report.write(folder, results)
    failed: list[str] = []
    for name in options.scenarios:
        say(f"scenario {name}")
        context = scenarios.Context(cache, folder, model, config, settings, prompts, options, say)
        try:
            results["scenarios"][name] = scenarios.SCENARIOS[name](context)
        except (scenarios.Skipped, Unsupported, DriverFailed) as error:
            say(f"  {error}")
            results["scenarios"][name] = not_measured(name, str(error))
        except Exception as error:  # the others are measured for all that
            traceback.print_exc()
            failed.append(name)
            results["scenarios"][name] = not_measured(name, f"{type(error).__name__}: {error}")
        report.write(folder, results)
    report.write(folder, results)
    report.plot(folder, say)
    print((folder / "results.md").read_text())
    say(f"written to {folder}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def not_measured(scenario: str, reason: str) -> dict[str, Any]:
    return {"title": f"Scenario {scenario}", "columns": [], "rows": [], "note": f"Not measured: {reason}"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures this server and its peers side by side.")
    parser.add_argument("--systems", type=one_of(DRIVERS), default=list(DRIVERS), help=f"of {','.join(DRIVERS)}; those not installed are shown so")
    parser.add_argument("--dtypes", type=one_of(PRECISIONS), default=["float32", "bfloat16"], help=f"of {','.join(PRECISIONS)}")
    parser.add_argument("--shapes", type=shapes, default=shapes("64/64,512/64,64/1"), help="prompt/answer tokens; `none`: no rows")
    parser.add_argument("--streams", type=lambda text: [int(count) for count in text.split(",")], default=[1, 4, 8, 16], help="requests at a time")
    parser.add_argument("--mixes", type=one_of(MIXES), default=list(MIXES), help=f"of {','.join(MIXES)}")
    parser.add_argument("--sampling", type=sampling, default=GREEDY, help="of the answers of rows, in scenarios too, as temperature=0.8,top_p=0.95 (or top_k, min_p); default: greedy")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each row")
    parser.add_argument("--scenarios", type=one_of(scenarios.SCENARIOS), default=list(scenarios.SCENARIOS), help=f"of {','.join(scenarios.SCENARIOS)}, or none")
    parser.add_argument("--counts", type=lambda text: [int(count) for count in text.split(",")], default=[1, 8, 64, 512, 2000], help="adapters on disk, for scenario `zipf`")
    parser.add_argument("--python", type=lambda text: tuple(text.split("=", 1)), action="append", default=[], help="SYSTEM=PATH: another environment for a system")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results")
    options = parser.parse_args()
    options.python = dict(options.python)
    return options


def one_of(known: Sequence[str] | dict[str, Any]) -> Any:
    """A parser of lists of known names; `none` is the empty list."""

    def parse(text: str) -> list[str]:
        names = [] if text == "none" else text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def shapes(text: str) -> list[tuple[int, int]]:
    if text == "none":
        return []
    return [(int(prompt), int(answer)) for prompt, _, answer in (shape.partition("/") for shape in text.split(","))]


def sampling(text: str) -> dict[str, float]:
    """All of a sampler's settings, since systems have defaults of their own for those that are left out."""
    found = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    for name, _, value in (pair.partition("=") for pair in text.split(",")):
        if name not in found:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(found)}")
        found[name] = type(found[name])(value)
    return found


def make_setup(
    settings: Settings, dtype: str, model: pathlib.Path, config: ModelConfig, prepared: adapters.Prepared, gguf_cache: pathlib.Path | None, say: Any
) -> dict[str, Any]:
    """What every driver starts from; each takes what concerns it. GGUF files are written to `gguf_cache`, if there is one to write them for."""
    llama_server = PROJECT / DRIVERS["llama"].needs
    setup = {
        "model": str(model), "dtype": dtype, "environment": settings.environment(), "repository": str(prepared.repository),
        "store": str(prepared.store), "adapters": {name: str(folder) for name, folder in zip(prepared.names, prepared.folders)},
        "slots": settings.max_slots, "max_seq_len": settings.max_seq_len, "max_rank": max(adapters.RANKS),
        "llama_server": str(llama_server), "vllm": str(PROJECT / DRIVERS["vllm"].needs),
    }  # fmt: skip
    if gguf_cache and llama_server.exists():
        try:
            setup |= gguf_setup(settings, dtype, model, config, prepared, gguf_cache / "gguf" / dtype, say)
        except NoGguf as reason:
            setup["no_gguf"] = str(reason)
    return setup


def gguf_setup(
    settings: Settings, dtype: str, model: pathlib.Path, config: ModelConfig, prepared: adapters.Prepared, folder: pathlib.Path, say: Any
) -> dict[str, Any]:
    """GGUF files of the base model and of the adapters; made once."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "model.gguf"
    if not base.exists():
        say(f"writing {base.name} ({dtype})")
        write_model(model, base, config, dtype)
    files = {name: folder / f"{name.replace('/', '-')}.gguf" for name in prepared.names}
    for source, target in zip(prepared.folders, files.values()):
        if not target.exists():
            write_adapter(source, target, config, settings.dtype)
    return {"gguf_model": str(base), "gguf_adapters": {name: str(file) for name, file in files.items()}}


def measure_gemm(session: Session, gemm: dict[str, dict[str, float]]) -> None:
    """Large matrix products by those systems that can tell."""
    for name in ("engine", "peft"):
        if name in session.running:
            for dtype, speed in session.running[name].worker.call("limits").items():
                gemm[dtype][name] = max(speed, gemm[dtype].get(name, 0.0))


def weights_per_token(config: ModelConfig) -> int:
    """Weights that one decode step reads whatever the number of rows: all linear layers and the output layer."""
    return sum(at.in_features * at.out_features for at in config.linear_paths().values())


def commit() -> str:
    """The commit that is measured, with a `+` if files differ from it."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what was started is stopped
    main()
