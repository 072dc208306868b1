"""`training.dpo` as a person runs it, and what holds for its losses on any model."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import peft
from jaxlora.adapters import publish
from jaxlora.config import ModelConfig
from jaxlora.settings import Settings
from tests.training import tiny
from training import dpo
from training.lora_init import new_adapter, to_peft
from training.losses import LogProbs, Terms
from training.losses.preference import PAIRWISE, PreferenceLoss, UnpairedLoss, log_odds

pytestmark = pytest.mark.usefixtures("quick_compilation")
DATA = [{"prompt": f"{at % 10} then ", "chosen": "yes" * (1 + at % 4), "rejected": "no" * (1 + at % 3)} for at in range(24)]


@pytest.fixture
def place(tmp_path: pathlib.Path, tiny_model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    cache = Settings.read().cache_dir
    monkeypatch.setenv("MODEL", str(tiny_model))
    monkeypatch.setenv("CACHE_DIR", str(cache))  # native kernels are built once on a machine
    (tmp_path / "store").mkdir()
    tiny.write_lines(tmp_path / "data.jsonl", DATA)
    return tmp_path


def _run(place: pathlib.Path, run: str, *more: Any, steps: int = 3) -> int:
    options = {
        "data": place / "data.jsonl", "name": "alice/yes", "run": place / run, "max-steps": steps, "batch-size": 8, "buckets": 1,
        "max-length": 64, "rank": 4, "lr": 1e-2, "schedule": "constant", "warmup": 0, "store": place / "store",
    }  # fmt: skip
    argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return dpo.main([*argv, "--no-publish", *map(str, more)])


def _entries(run: pathlib.Path, key: str = "loss") -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if key in entry]


def test_the_chosen_answers_win(place: pathlib.Path) -> None:
    assert _run(place, "run", "--eval-share", 0.3, "--metric", "exact_match", "--eval-max-tokens", 8, steps=8) == 0
    log = _entries(place / "run")
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and log[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["loss"] < 0.4 and log[-1]["rewards/accuracies"] == 1
    scores = _entries(place / "run", "eval_loss")[-1]
    assert scores["eval_loss"] < 0.5 and 0 <= scores["eval_exact_match"] <= 1


def test_a_step_of_kto_does_not_depend_on_its_micro_batches(place: pathlib.Path) -> None:
    for size in (8, 2):
        assert _run(place, f"run{size}", "--loss", "kto", "--micro-batch-size", size) == 0
    for key in ("loss", "grad_norm", "kl"):
        one, many = ([entry[key] for entry in _entries(place / run)] for run in ("run8", "run2"))
        np.testing.assert_allclose(one, many, rtol=2e-5)
    assert one[-1] > 0


def test_the_reference_is_the_start_or_the_base(place: pathlib.Path, tiny_model: pathlib.Path) -> None:
    config, raw = ModelConfig.from_folder(tiny_model), peft.new_config(r=4, lora_alpha=8, target_modules="all-linear")
    adapter = new_adapter(config, raw, 5)
    adapter = adapter.replace(b=jax.tree.map(lambda b: jnp.full_like(b, 0.1), adapter.b))
    assert publish(to_peft(adapter, raw), "alice/yes", place / "store") == 1
    for reference in ("start", "base"):
        assert _run(place, reference, "--init", "alice/yes", "--reference", reference, steps=1) == 0
    start, base = (_entries(place / run)[0] for run in ("start", "base"))
    assert start["rewards/chosen"] == pytest.approx(0, abs=1e-5) and abs(base["rewards/chosen"]) > 0.1
    assert start["logps/chosen"] == pytest.approx(base["logps/chosen"], rel=1e-5)


def test_a_run_that_goes_on_keeps_the_version_that_it_started_from(place: pathlib.Path, tiny_model: pathlib.Path) -> None:
    config, raw = ModelConfig.from_folder(tiny_model), peft.new_config(r=4, lora_alpha=8, target_modules="all-linear")
    for seed in (1, 2):
        publish(to_peft(new_adapter(config, raw, seed), raw), "alice/yes", place / "store")
        assert _run(place, "run", "--init", "alice/yes", steps=2) == 0
        config_of_run = json.loads((place / "run" / "run.json").read_text())
        assert config_of_run["start"] == "alice/yes@1"
    assert _run(place, "run", "--init", "alice/yes", "--restart", steps=2) == 0
    assert json.loads((place / "run" / "run.json").read_text())["start"] == "alice/yes@2"
    assert _run(place, "run", "--init", "alice/yes@1", steps=2) == 1


def test_a_reference_computed_before_trains_the_same(
    place: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CACHE_DIR", str(place / "cache"))
    for run, more in (("step", ()), ("before", ("--precompute-reference",)), ("again", ("--precompute-reference",))):
        assert _run(place, run, "--eval-share", 0.3, *more) == 0
    assert capsys.readouterr().err.count("computing the reference's log-probabilities of") == 2  # learned and held out, once
    for key in ("loss", "grad_norm", "rewards/margins", "eval_loss"):
        step, before, again = ([entry[key] for entry in _entries(place / run, key)] for run in ("step", "before", "again"))
        np.testing.assert_allclose(before, step, rtol=1e-5, atol=1e-5)
        assert before == again


def test_kto_takes_judged_answers(place: pathlib.Path) -> None:
    records = [{"prompt": f"{at} then ", "completion": ("yes", "no")[at % 2] * 3, "label": at % 2 == 0} for at in range(16)]
    tiny.write_lines(place / "data.jsonl", records)
    assert _run(place, "run", "--loss", "kto", "--eval-share", 0.25, steps=8) == 0
    log = _entries(place / "run")
    assert log[-1]["rewards/chosen"] > log[-1]["rewards/rejected"] + 0.5 and log[-1]["loss"] < log[0]["loss"]
    assert "eval_kl" in _entries(place / "run", "eval_loss")[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--loss", "ppo"], "--loss: 'ppo' is none of sigmoid, robust, hinge, ipo, orpo, kto"),
        (["--loss", "ipo", "--label-smoothing", 0.1], "--label-smoothing: ipo has none; sigmoid and robust do"),
        (["--reference", "mine"], "--reference: 'mine' is neither start nor base"),
        (["--loss", "orpo", "--precompute-reference"], "which orpo is not"),
        (["--beta", 0], "--beta: 0.0 is not 1e-06 or more"),
    ],
)
def test_wrong_options_are_told(place: pathlib.Path, more: list, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(place, "run", *more) == 1
    assert message in capsys.readouterr().err


def _batch(rows: int, filling: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    live = (np.arange(rows + filling) < rows)[:, None]
    batch = {}
    for name in ("chosen", "rejected", "tokens", "other"):
        length = random.integers(3, 9, (rows + filling, 1))
        batch[name] = random.integers(0, 9, (rows + filling, 9)) * live
        mask = (np.arange(9) >= 2) & (np.arange(9) < length) & live
        batch["mask" if name == "tokens" else f"{name}_mask"] = mask.astype(np.uint8)
    batch["desirable"] = (np.arange(rows + filling) % 2 * live[:, 0]).astype(np.uint8)
    return batch


LOSSES = [*(PreferenceLoss(kind, 0.3) for kind in PAIRWISE), UnpairedLoss(0.3)]


def _terms(loss: PreferenceLoss | UnpairedLoss, batch: dict[str, np.ndarray]) -> Terms:
    def model(shift: float) -> LogProbs:
        return lambda tokens, wanted: -jnp.sqrt(1.0 + tokens + shift) * (wanted != 0)

    return loss(model(0.5), model(0.0), {name: jnp.asarray(array) for name, array in batch.items()})


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: getattr(loss, "kind", "kto"))
def test_rows_that_fill_a_batch_add_nothing(loss: PreferenceLoss | UnpairedLoss) -> None:
    batch = _batch(4, 3)
    padded, whole = _terms(loss, batch), _terms(loss, {name: array[:4] for name, array in batch.items()})
    assert float(padded.count) == 4 and float(whole.total) > 0
    for ours, theirs in zip(jax.tree.leaves(padded), jax.tree.leaves(whole), strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: getattr(loss, "kind", "kto"))
def test_terms_add_up_over_micro_batches(loss: PreferenceLoss | UnpairedLoss) -> None:
    batch = {**_batch(6, 0), "kl": np.full(6, 0.25, np.float32)}
    parts = [_terms(loss, {name: array[start : start + 2] for name, array in batch.items()}) for start in (0, 2, 4)]
    for whole, *each in zip(jax.tree.leaves(_terms(loss, batch)), *map(jax.tree.leaves, parts), strict=True):
        assert float(sum(each)) == pytest.approx(float(whole), rel=1e-5, abs=1e-6)


def test_odds_and_their_slope_are_finite_for_every_probability() -> None:
    log_probs = jnp.array([-1e30, -200.0, -20.0, -1.0, -0.69, -1e-3, -1e-7, 0.0], jnp.float32)
    slopes = jax.vmap(jax.grad(log_odds))(log_probs)
    assert jnp.isfinite(log_odds(log_probs)).all() and jnp.isfinite(slopes).all()
    exact = np.log(np.expm1(-np.array(log_probs[2:6], np.float64)))
    np.testing.assert_allclose(log_odds(log_probs)[2:6], -exact, rtol=1e-5)
