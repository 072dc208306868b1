"""Runs of 20 steps against those of TRL and PEFT: the same data, initial adapter and optimizer give the same losses and
gradients."""

import functools
import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jaxlora.lora import Adapter
from jaxlora.settings import Settings
from training.losses import Batch, LogProbs, Terms, preference
from training.losses.preference import Answers, PreferenceLoss, UnpairedLoss, orpo
from training.machine import choose
from training.step import make_evaluation

from . import preference_model, preference_runs as runs
from .preference_model import Model

SOURCES = ("fresh",) if importlib.util.find_spec("trl") else ("stored",)
TOLERANCE = 1e-4  # relative, at any step
DRIFT = 1e-5  # relative, on average over the steps: differences have to come out on both sides


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return preference_model.load(tmp_path_factory.mktemp("model"), choose(Settings.read().cache_dir / "native", "float32"))


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
def test_pairs_train_as_in_trl(name: str, record: dict[str, Any], ours: Callable[[str], dict[str, np.ndarray]]) -> None:
    _compare(ours(name), record["runs"][name])


def test_kto_in_micro_batches_trains_as_in_trl_without(record: dict[str, Any], our_kto: dict[str, np.ndarray]) -> None:
    _compare(our_kto, record["runs"]["kto"])


def test_orpo_compares_odds_as_trl_does(record: dict[str, Any]) -> None:
    chosen, rejected = (jnp.array(record["odds"][side], jnp.float32) for side in ("chosen", "rejected"))

    def compared(chosen: Array, rejected: Array) -> Array:
        sides = (Answers(5 * means, jnp.zeros_like(means), jnp.full(means.shape, 5)) for means in (chosen, rejected))
        return orpo(*sides, beta=1.0) + chosen  # without the likelihood of the chosen answer

    np.testing.assert_allclose(compared(chosen, rejected), record["odds"]["loss"], rtol=1e-4, atol=1e-7)
    slopes = jax.grad(lambda *sides: compared(*sides).sum(), argnums=(0, 1))(chosen, rejected)
    for side, slope in zip(("chosen", "rejected"), slopes):
        np.testing.assert_allclose(slope, record["odds"][f"{side}_gradient"], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def ours(model: Model) -> Callable[[str], dict[str, np.ndarray]]:
    """Our runs on pairs, by name. One compiled step computes every loss, and the data say which of them counts."""
    losses = [PreferenceLoss(run.loss, run.beta, run.label_smoothing) for run in runs.RUNS.values()]

    def chosen_loss(policy: LogProbs, reference: LogProbs, batch: Batch) -> Terms:
        policy, reference = _once(policy), _once(reference)
        found = [loss(policy, reference, batch) for loss in losses]
        return Terms(jnp.stack([terms.total for terms in found])[batch["loss"][0]], found[0].count, {})

    train = preference_model.trainer(model, chosen_loss)

    def run(name: str) -> dict[str, np.ndarray]:
        number = list(runs.RUNS).index(name)
        windows = [preference_model.pair_window(step) for step in range(runs.STEPS)]
        return train([{**window, "loss": np.full(window["chosen"].shape[:2], number)} for window in windows])

    return functools.cache(run)


@pytest.fixture(scope="module")
def our_kto(model: Model) -> dict[str, np.ndarray]:
    loss = UnpairedLoss(runs.KTO_BETA, runs.KTO_DESIRABLE, runs.KTO_UNDESIRABLE)
    divergence = make_evaluation(model.config, preference.other_divergence, machine=model.machine)

    def with_kl(window: dict[str, np.ndarray], adapter: Adapter) -> dict[str, np.ndarray]:
        terms = divergence(adapter, model.weights, model.adapter, window)
        return preference.with_kl(window, float(terms.total / terms.count))

    return preference_model.trainer(model, loss, with_kl)([_labelled_window(step, 4) for step in range(runs.STEPS)])


def _once(model: LogProbs) -> LogProbs:
    """Every loss asks for the same log-probabilities, so the first answer does for all."""
    answers: list[Array] = []

    def answer(*arguments: Any, **named: Any) -> Array:
        if not answers:
            answers.append(model(*arguments, **named))
        return answers[0]

    return answer


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
