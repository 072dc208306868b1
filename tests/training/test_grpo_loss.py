"""GRPO's advantages and loss against a plain NumPy account of the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.losses.grpo import GrpoLoss, advantages

ROWS, LENGTH, LONGEST = 6, 9, 12


def _batch(seed: int = 0, filling: int = 0) -> dict[str, np.ndarray]:
    """Rows with answers of different lengths behind prompts of different lengths; the last `filling` rows are zero."""
    random = np.random.default_rng(seed)
    mask = np.zeros((ROWS, LENGTH), np.int32)
    for row in range(ROWS - filling):
        start = random.integers(1, 4)
        mask[row, start : random.integers(start + 1, LENGTH + 1)] = 1
    scale = random.normal(size=(3, ROWS, LENGTH)).astype(np.float32)
    return {
        "logps": -2 + 0.3 * scale[0],
        "old_logps": -2 + 0.3 * scale[1],
        "ref_logps": -2 + 0.3 * scale[2],
        "mask": mask,
        "tokens": np.zeros((ROWS, LENGTH), np.int32),
        "advantages": random.normal(size=ROWS).astype(np.float32) * (np.arange(ROWS) < ROWS - filling),
    }


def _loss(loss: GrpoLoss, batch: dict[str, np.ndarray], logps=None):
    logps = batch["logps"] if logps is None else logps
    given = {name: jnp.asarray(batch[name]) for name in ("tokens", "mask", "advantages", "old_logps") if name in batch}
    return loss(lambda tokens, **_: jnp.asarray(logps), lambda tokens, **_: jnp.asarray(batch["ref_logps"]), given)


def _paper(batch: dict[str, np.ndarray], kl: float, low: float, high: float, normalisation: str) -> float:
    """-J of DeepSeekMath's equation 3 with the estimate of equation 4, by loops over answers and tokens."""
    per_answer, everything, answers = [], [], 0
    for row in range(ROWS):
        tokens = np.flatnonzero(batch["mask"][row])
        if not len(tokens):
            continue
        answers += 1
        terms = []
        for token in tokens:
            new, old, ref = (float(batch[name][row, token]) for name in ("logps", "old_logps", "ref_logps"))
            gain, ratio = float(batch["advantages"][row]), np.exp(new - old)
            surrogate = min(ratio * gain, min(max(ratio, 1 - low), 1 + high) * gain)
            divergence = np.exp(ref - new) - (ref - new) - 1
            terms.append(surrogate - kl * divergence)
        per_answer.append(np.mean(terms))
        everything += terms
    if normalisation == "grpo":
        return -float(np.mean(per_answer))
    if normalisation == "dapo":
        return -float(np.mean(everything))
    return -float(np.sum(everything)) / (answers * LONGEST)  # Dr. GRPO, equation 2, with a constant for the length


@pytest.mark.parametrize("filling", [0, 2])
@pytest.mark.parametrize("kl", [0.0, 0.04])
@pytest.mark.parametrize("normalisation", ["grpo", "dapo", "dr_grpo"])
def test_loss_is_the_papers(normalisation: str, kl: float, filling: int) -> None:
    batch = _batch(1, filling)
    terms = _loss(GrpoLoss(normalisation, 0.2, 0.28, kl, LONGEST), batch)
    expected = _paper(batch, kl, 0.2, 0.28, normalisation)
    assert float(terms.total / terms.count) == pytest.approx(expected, rel=1e-5)


def test_metrics_count_tokens_whose_gradient_is_clipped_away() -> None:
    batch = _batch(2)
    loss = GrpoLoss(clip_low=0.1, clip_high=0.1)
    gradient = jax.grad(lambda logps: _loss(loss, batch, logps).total)(jnp.asarray(batch["logps"]))
    without = np.sum((np.asarray(gradient) == 0) & (batch["mask"] > 0))
    metrics = _loss(loss, batch).metrics
    clipped = metrics["clip/low"][0] + metrics["clip/high"][0]
    assert without > 5 and float(clipped) == without
    assert float(metrics["clip/low"][1]) == batch["mask"].sum()


def test_on_policy_gradient_is_that_of_reinforce() -> None:
    batch = _batch(3)
    del batch["old_logps"]
    gradient = jax.grad(lambda logps: _loss(GrpoLoss("dapo"), batch, logps).total)(jnp.asarray(batch["logps"]))
    np.testing.assert_allclose(gradient, -batch["advantages"][:, None] * batch["mask"], rtol=1e-6)


@pytest.mark.parametrize("normalisation", ["grpo", "dapo", "dr_grpo"])
def test_terms_add_up_over_micro_batches(normalisation: str) -> None:
    batch, loss = _batch(4), GrpoLoss(normalisation, kl=0.1, max_completion=LONGEST)
    whole = _loss(loss, batch)
    parts = [_loss(loss, {name: array[start : start + 2] for name, array in batch.items()}) for start in range(0, ROWS, 2)]
    assert float(sum(part.total for part in parts)) == pytest.approx(float(whole.total), rel=1e-5)
    assert float(sum(part.count for part in parts)) == float(whole.count)


def test_what_the_mask_leaves_out_has_no_influence() -> None:
    batch, loss = _batch(5), GrpoLoss(kl=0.1)
    expected = _loss(loss, batch)
    for name in ("logps", "old_logps", "ref_logps"):
        batch[name] = np.where(batch["mask"] > 0, batch[name], -1e30).astype(np.float32)
    assert float(_loss(loss, batch).total) == float(expected.total)


def test_no_answers_make_no_loss() -> None:
    terms = _loss(GrpoLoss(kl=0.1), _batch(6, filling=ROWS))
    assert float(terms.total) == 0 and float(terms.count) == 0


def test_advantages_are_rewards_in_units_of_their_groups_deviation() -> None:
    rewards = np.random.default_rng(0).normal(3, 2, size=(5, 8))
    expected = [(row - np.mean(row)) / np.std(row, ddof=1) for row in rewards]
    np.testing.assert_allclose(advantages(rewards), expected, rtol=1e-3)  # but for the constant that guards a deviation of 0
    np.testing.assert_allclose(advantages(rewards, "none"), rewards - rewards.mean(axis=1, keepdims=True), rtol=1e-5, atol=1e-6)
    batch = (rewards - rewards.mean(axis=1, keepdims=True)) / rewards.std(ddof=1)
    np.testing.assert_allclose(advantages(rewards, "batch"), batch, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_teach_nothing(scale: str) -> None:
    assert not advantages(np.full((2, 4), 0.7), scale).any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_answers_without_a_reward_take_no_part(scale: str) -> None:
    known = np.array([[1.0, 0.0, 0.5]])
    found = advantages(np.array([[1.0, np.nan, 0.0, 0.5]]), scale)
    np.testing.assert_allclose(found[0, [0, 2, 3]], advantages(known, scale)[0], rtol=1e-6)
    assert found[0, 1] == 0
    assert not advantages(np.array([[np.nan, 2.0], [np.nan, np.nan]]), scale).any()
