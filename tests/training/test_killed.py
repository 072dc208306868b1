"""A run that is killed at any moment, also in a checkpoint or while publishing, goes on to the same bytes and publishes once."""

import os
import pathlib
import random
import signal
import subprocess
import sys

from tests.training import tiny

ROOT = pathlib.Path(__file__).parents[2]
KILLS = 10


def test_kill_9_at_any_moment(tiny_model: pathlib.Path, cache_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tiny.write_lines(tmp_path / "data.jsonl", tiny.sums(24))
    options = [
        "--data",
        tmp_path / "data.jsonl",
        "--name",
        "a/b",
        "--url",
        "127.0.0.1:9",
        "--max-steps",
        6,
        "--checkpoint-every",
        1,
    ]
    options += ["--batch-size", 8, "--buckets", 1, "--rank", 4, "--dropout", 0.1, "--lr", 1e-2]
    environ = os.environ | {"MODEL": str(tiny_model), "CACHE_DIR": str(cache_dir), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def run(place: str, touches: int) -> int:
        (tmp_path / place / "store").mkdir(parents=True, exist_ok=True)
        places = ["--run", tmp_path / place / "run", "--store", tmp_path / place / "store"]
        command = [sys.executable, "-m", "tests.training.killed", str(touches), *map(str, [*options, *places])]
        return subprocess.run(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE).returncode

    assert run("whole", 0) == 0
    rng, killed = random.Random(0), 0
    # A few touches each time, so that the run gets further, and is killed in everything that it does.
    while (code := run("parts", rng.randint(4, 17) if killed < KILLS else 0)) != 0:
        assert code == -signal.SIGKILL
        killed += 1
    assert killed >= KILLS
    for file in ("run/adapter/adapter_model.safetensors", "store/users/a/adapters/b/1/adapter_model.safetensors"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    versions = [entry.name for entry in (tmp_path / "parts/store/users/a/adapters/b").iterdir() if ".incoming-" not in entry.name]
    assert versions == ["1"]
