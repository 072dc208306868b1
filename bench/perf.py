"""Measures a server with Triton's perf_analyzer: `python -m bench.perf --help`.

Text to `llm` over gRPC, answers streamed, a sweep over the number of requests at a time: first the base model, then the adapters that are
in service, in turn. Knows where perf_analyzer is, what it is to send, and how to read what it leaves; what it measures is its own affair.
"""

import argparse
import contextlib
import csv
import itertools
import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bench import adapters
from bench.workloads import Prompts
from client import Client, wire
from client.errors import ServerUnreachable
from jaxlora.checkpoint import resolve
from jaxlora.config import ModelConfig
from jaxlora.errors import ServingError, SetupError
from jaxlora.settings import Settings
from jaxlora.text import Tokenizer
from server import preflight, repository
from server.launch import ServerDied, TritonServer

INSTALLED = repository.PROJECT / ".venv-perf" / "bin"
PROMPTS = 256
"""So many different ones; then they come again."""
COLUMNS = ("answered by", "requests at a time", "requests/s", "responses/s", "latency p50 / p95, ms", "first response p50 / p95, ms")


def main() -> None:
    options, further = parse()
    settings = Settings.read(parameters=repository.parameters(repository.REPOSITORY))
    tool = find()
    folder = options.out or repository.PROJECT / "runs" / "perf" / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    model = resolve(settings.model, settings.cache_dir)
    prompts = Prompts(Tokenizer.from_folder(model))
    texts = [prompts.make(options.prompt, index)[1] for index in range(PROMPTS)]
    table = []
    with server(options.url, settings, model) as url:
        with Client(url) as client:
            names = [adapter.name for adapter in client.adapters() if adapter.serving is not None]
        for title, mix in (("base model", [""]), (f"{len(names)} adapters", names)):
            if not mix:
                print("No adapter is in service, so only the base model was measured.")
                continue
            stem = folder / title.replace(" ", "-")
            inputs = stem.with_suffix(".inputs.json")
            inputs.write_text(json.dumps(input_data(texts, options.answer, mix)))
            for count in options.concurrency:
                command = [tool, "-m", wire.ENSEMBLE, "-u", url, "--input-data", str(inputs), *further]
                table.append((title, str(count), *run(command, count, max(count, options.requests), stem.with_name(f"{stem.name}-{count}"))))
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *table)))
    print(f"\nprompt {options.prompt}, answer {options.answer} tokens, greedy; written to {folder}")


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The options, and what is left for perf_analyzer."""
    parser = argparse.ArgumentParser(
        "python -m bench.perf", description="Measures a server with Triton's perf_analyzer, which gets all options that are not listed here."
    )
    parser.add_argument("--url", metavar="HOST:PORT", help="the server's gRPC address (default: HOST and GRPC_PORT; one is started if none answers)")
    parser.add_argument("--concurrency", type=lambda text: [int(count) for count in text.split(",")], default=[1, 4, 8, 16], help="requests at a time")
    parser.add_argument("--requests", type=int, default=32, help="requests for each of these")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--out", type=pathlib.Path, help="folder for what is sent and measured (default: a new one in runs/perf)")
    return parser.parse_known_args()


def find() -> str:
    """perf_analyzer: the one on PATH, as in NVIDIA's SDK container, else the one that `make perf` installed.

    Raises:
        SetupError: there is none.
    """
    found = shutil.which("perf_analyzer") or shutil.which("perf_analyzer", path=INSTALLED)
    if found is None:
        raise SetupError("perf_analyzer is neither on PATH nor in .venv-perf; `make perf` installs it, and says what it needs where it can't")
    return found


@contextlib.contextmanager
def server(url: str | None, settings: Settings, model: pathlib.Path) -> Iterator[str]:
    """The gRPC address of a server that is ready. Where none is named and none answers, one with random adapters runs as long as this does."""
    there = url or f"{settings.host}:{settings.grpc_port}"
    if url or answers(there):
        yield there
        return
    print(f"no server at {there}; starting one", flush=True)
    preflight.check(settings)
    prepared = adapters.prepare(adapters.cache_of(settings, model), ModelConfig.from_folder(model), settings, adapters.sixteen())
    with TritonServer(settings, model_repository=prepared.repository, base_folder=model) as started:
        yield started.grpc_url


def answers(url: str) -> bool:
    """Whether there is a server."""
    with Client(url) as client:
        try:
            return client.is_ready()
        except ServerUnreachable:
            return False


def run(command: Sequence[str], concurrency: int, requests: int, stem: pathlib.Path) -> tuple[str, ...]:
    """The cells of the table for so many requests, so many at a time. What perf_analyzer leaves has the name `stem`."""
    report, export = stem.with_suffix(".csv"), stem.with_suffix(".json")
    command = [
        *command, "-i", "grpc", "--streaming", "--async", "--concurrency-range", str(concurrency), "--request-count", str(requests),
        # With fewer of these than come at a time, 2.51 waits for ever.
        "--warmup-request-count", str(concurrency), "-f", str(report), "--profile-export-file", str(export),
    ]  # fmt: skip
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)
    return measured(report, export)


def input_data(texts: Sequence[str], answer: int, names: Sequence[str]) -> dict[str, Any]:
    """Requests in perf_analyzer's format (its documentation, "Input data"), for these adapters in turn; an empty name is the base model."""
    sampling = json.dumps({"max_tokens": answer, "temperature": 0, "ignore_eos": True})
    return {
        "data": [
            {"text_input": [text], "stream": [True], "sampling_parameters": [sampling], "lora_name": [name]}
            for text, name in zip(texts, itertools.cycle(names))
        ]
    }


def measured(report: pathlib.Path, export: pathlib.Path) -> tuple[str, ...]:
    """Throughput from perf_analyzer's report, and latency from the times of all responses that it exports, as cells of the table."""
    with report.open(newline="") as file:
        throughput = next(csv.DictReader(file))
    (experiment,) = json.loads(export.read_text())["experiments"]
    taken = [[at - request["timestamp"] for at in request["response_timestamps"]] for request in experiment["requests"]]
    speeds = (f"{float(throughput[name]):.1f}" for name in ("Inferences/Second", "Response Throughput"))
    return (*speeds, _percentiles([times[-1] for times in taken]), _percentiles([times[0] for times in taken]))


def _percentiles(nanoseconds: Sequence[int]) -> str:
    return " / ".join(f"{value / 1e6:.0f}" for value in np.percentile(nanoseconds, (50, 95)))


if __name__ == "__main__":
    try:
        main()
    except (SetupError, ServingError, ServerDied) as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: perf_analyzer ended with {error.returncode}")
