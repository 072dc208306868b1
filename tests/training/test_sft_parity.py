"""SFT for 20 steps against PEFT and torch: the same data, initial adapter and optimizer give the same losses and gradients."""

import importlib.util
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from training.losses.sft import sft

from . import preference_model, preference_runs as runs
from .preference_model import Model

SOURCES = ("stored", "fresh") if importlib.util.find_spec("torch") else ("stored",)
FILE = runs.FILE.with_name("sft.json")
TOLERANCE = 1e-4  # relative, at any step
DRIFT = 1e-5  # relative, on average over the steps: differences have to come out on both sides


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return preference_model.load(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=SOURCES)
def record(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "stored":
        return json.loads(pathlib.Path(FILE).read_text())
    from . import record_sft

    return record_sft.record()


def windows(micro_batches: int) -> list[dict[str, np.ndarray]]:
    found = []
    for step in range(runs.STEPS):
        rows = runs.pairs()[step * runs.BATCH : (step + 1) * runs.BATCH]
        tokens, mask = preference_model.sequences(rows, "chosen_ids")
        found.append({"tokens": tokens.reshape(micro_batches, -1, tokens.shape[1]), "mask": mask.reshape(micro_batches, -1, mask.shape[1])})
    return found


def test_sft_trains_as_in_peft(record: dict[str, Any], model: Model) -> None:
    assert record["data"] == runs.fingerprint() and record["fingerprints"] == model.fingerprints
    train, theirs = preference_model.trainer(model, sft), record["runs"]["sft"]
    ours = train(windows(2))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=TOLERANCE, err_msg=name)
        assert abs(np.mean(ours[name] / np.array(theirs[name]) - 1)) < DRIFT, name
    assert theirs["loss"][-1] != pytest.approx(theirs["loss"][0], rel=1e-2)
