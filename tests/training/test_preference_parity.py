"""Runs of 20 steps against those of TRL and PEFT: the same data, initial adapter and optimizer give the same losses and gradients."""

import importlib.util
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from training.losses import preference
from training.losses.preference import PreferenceLoss, UnpairedLoss
from training.step import make_evaluation

from . import preference_model, preference_runs as runs
from .preference_model import Model

SOURCES = ("stored", "fresh") if importlib.util.find_spec("trl") else ("stored",)
TOLERANCE = 1e-4  # relative, at any step
DRIFT = 1e-5  # relative, on average over the steps: differences have to come out on both sides


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return preference_model.load(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=SOURCES)
def record(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "stored":
        return json.loads(pathlib.Path(runs.FILE).read_text())
    from . import record_preference

    return record_preference.record()


def test_record_belongs_to_this_data(record: dict[str, Any], model: Model) -> None:
    assert record["data"] == runs.fingerprint()
    assert record["fingerprints"] == model.fingerprints


@pytest.mark.parametrize("name", runs.RUNS)
def test_pairs_train_as_in_trl(name: str, record: dict[str, Any], model: Model) -> None:
    run = runs.RUNS[name]
    loss = PreferenceLoss(run.loss, run.beta, run.label_smoothing)
    ours = preference_model.train(model, loss, [preference_model.pair_window(step) for step in range(runs.STEPS)])
    _compare(ours, record["runs"][name])


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_kto_trains_as_in_trl_in_any_micro_batches(micro_batches: int, record: dict[str, Any], model: Model) -> None:
    loss = UnpairedLoss(runs.KTO_BETA, runs.KTO_DESIRABLE, runs.KTO_UNDESIRABLE)
    divergence = make_evaluation(model.config, preference.other_divergence)

    def with_kl(window: dict[str, np.ndarray], adapter: Any) -> dict[str, np.ndarray]:
        terms = divergence(adapter, model.weights, model.adapter, window)
        return preference.with_kl(window, float(terms.total / terms.count))

    ours = preference_model.train(model, loss, [_labelled_window(step, micro_batches) for step in range(runs.STEPS)], with_kl)
    _compare(ours, record["runs"]["kto"])


def _labelled_window(step: int, micro_batches: int) -> dict[str, np.ndarray]:
    rows = runs.labelled()[step * runs.BATCH : (step + 1) * runs.BATCH]
    arrays = dict(zip(("tokens", "mask"), preference_model.sequences(rows, "completion_ids")))
    arrays |= zip(("other", "other_mask"), preference_model.sequences(rows, "KL_completion_ids"))
    arrays["desirable"] = np.array([row["label"] for row in rows], np.uint8)
    return {name: array.reshape(micro_batches, -1, *array.shape[1:]) for name, array in arrays.items()}


def _compare(ours: dict[str, np.ndarray], theirs: dict[str, list[float]]) -> None:
    for name in ("loss", "grad_norm"):
        off = ours[name] / np.array(theirs[name]) - 1
        assert len(off) == runs.STEPS
        assert np.abs(off).max() < TOLERANCE, name
        assert abs(off.mean()) < DRIFT, name
