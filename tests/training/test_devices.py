"""Several devices share each micro-batch, and the run is the one that a single device makes."""

import os
import pathlib
import subprocess
import sys

import numpy as np

from tests.training import tiny
from training.run_folder import RunFolder

ROOT = pathlib.Path(__file__).parents[2]


def test_two_devices_train_as_one(tiny_model: pathlib.Path, cache_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tiny.write_lines(tmp_path / "data.jsonl", tiny.sums(20))
    command = [
        sys.executable,
        "-m",
        "training.sft",
        "--data",
        tmp_path / "data.jsonl",
        "--name",
        "a/b",
        "--no-publish",
        "--max-steps",
        4,
    ]
    command += ["--batch-size", 8, "--micro-batch-size", 4, "--buckets", 1, "--rank", 4, "--eval-share", 0.2]
    found = {}
    for devices in (1, 2):
        flags = f"--xla_force_host_platform_device_count={devices}"
        quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        environ = os.environ | quick | {"MODEL": str(tiny_model), "CACHE_DIR": str(cache_dir), "XLA_FLAGS": flags}
        subprocess.run([*map(str, command), "--run", str(tmp_path / str(devices))], cwd=ROOT, env=environ, check=True)
        found[devices] = RunFolder(tmp_path / str(devices)).metrics()
    assert len(found[1]) > 4
    for one, two in zip(found[1], found[2], strict=True):
        for name in {*one} & {"loss", "grad_norm", "eval_loss"}:
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, err_msg=name)
        assert one.get("count") == two.get("count")
