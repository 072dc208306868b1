"""The sampler, held to NumPy accounts of the same rules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.backend import XlaBackend
from jaxlora.engine import sampling
from jaxlora.engine.batch import idle_batch
from jaxlora.native.twins import keep_likely

VOCAB = 50
ROWS = 4


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32) * 3


def run(logits, positions=None, history=None, **settings):
    rows, vocab = logits.shape
    sampler = idle_batch(rows, 1, vocab).sampler
    for name, value in settings.items():
        array = getattr(sampler, name)
        if name == "banned":
            array[:, : np.shape(value)[-1]] = value
        else:
            array[:] = value
    positions = np.zeros(rows, np.int32) if positions is None else np.asarray(positions, np.int32)
    history = history or sampling.History.empty(rows, vocab)
    step = jax.jit(sampling.sample, static_argnames="backend")
    return jax.device_get(step(logits, sampler, positions, history, np.arange(rows, dtype=np.int32), XlaBackend()))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def kept_by_rules(row, top_k=0, top_p=1.0, min_p=0.0):
    """Which tokens stay, by sorting: the rules as Transformers' logits processors state them."""
    order = np.argsort(-row, kind="stable")
    keep = np.zeros(len(row), bool)
    keep[order[: top_k or len(row)]] = True
    shares = softmax(np.where(keep, row, -np.inf))
    nucleus, total = np.zeros(len(row), bool), 0.0
    for token in order:
        if total >= top_p:
            break
        nucleus[token] = True
        total += shares[token]
    keep &= nucleus
    return keep & (shares >= min_p * shares.max())


def test_neutral_settings_take_the_largest(logits):
    assert (run(logits).tokens == logits.argmax(axis=1)).all()


@pytest.mark.parametrize(
    "rules",
    [{"top_k": 1}, {"top_k": 5}, {"top_p": 0.3}, {"top_p": 0.9}, {"top_p": 1e-40}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}],
)
def test_the_filters_keep_what_sorting_keeps(logits, rules):
    full = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | rules
    arrays = (np.full(ROWS, full[name]) for name in ("top_k", "top_p", "min_p"))
    kept = np.isfinite(keep_likely(logits, *arrays))
    assert (kept == [kept_by_rules(row, **rules) for row in logits]).all()
    assert kept.any(axis=1).all()


def test_draws_follow_the_distribution():
    logits = np.tile(np.log(np.array([0.5, 0.3, 0.2], np.float32)), (3000, 1))
    tokens = run(logits, positions=np.arange(3000), temperature=1.0).tokens
    shares = np.bincount(tokens, minlength=3) / 3000
    assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 0.04


def test_temperature_sharpens():
    logits = np.tile(np.log(np.array([0.5, 0.3, 0.2], np.float32)), (500, 1))
    assert (run(logits, positions=np.arange(500), temperature=0.01).tokens == 0).all()


def test_a_draw_depends_on_seed_and_position_alone(logits):
    row = logits[:1]
    one = {at: run(row, [at], temperature=1.0, key=[1, 2]).tokens[0] for at in range(20)}
    mixed = run(np.concatenate([logits[1:], row]), [3, 8, 1, 5], temperature=1.0, key=[[9, 9], [8, 8], [7, 7], [1, 2]])
    assert mixed.tokens[3] == one[5]
    assert len(set(one.values())) > 3
    assert [run(row, [at], temperature=1.0, key=[1, 3]).tokens[0] for at in range(20)] != list(one.values())
    assert [run(row, [at], temperature=1.0, key=[2, 2]).tokens[0] for at in range(20)] != list(one.values())


def test_a_greedy_row_is_greedy_beside_rows_that_draw(logits):
    tokens = run(logits, temperature=[0, 1, 0, 5]).tokens
    assert tokens[0] == logits[0].argmax() and tokens[2] == logits[2].argmax()


def test_banned_tokens_never_come(logits):
    best = logits.argmax(axis=1)
    tokens = run(logits, banned=best[:, None]).tokens
    expected = np.where(np.arange(VOCAB) == best[:, None], -np.inf, logits).argmax(axis=1)
    assert (tokens == expected).all()


def test_penalties_follow_their_formulas(logits):
    rng = np.random.default_rng(1)
    history = sampling.History(rng.random((ROWS, VOCAB)) < 0.3, rng.integers(0, 3, (ROWS, VOCAB)).astype(np.int32))
    seen = history.prompt | (history.answer > 0)
    expected = np.where(seen, np.where(logits > 0, logits / 1.7, logits * 1.7), logits)
    expected = expected - 0.4 * history.answer - 0.9 * (history.answer > 0)
    tokens = run(logits, history=history, repetition=1.7, frequency=0.4, presence=0.9).tokens
    assert (tokens == expected.argmax(axis=1)).all()
    assert (tokens != logits.argmax(axis=1)).any()


def test_history_starts_anew_with_a_prompt_and_counts_the_answer():
    history = sampling.History(np.ones((2, 6), bool), np.ones((2, 6), np.int32))
    record = jax.jit(functools.partial(sampling.record_prompt, count=1, slots=jnp.array([1, 0]), tokens=jnp.array([2, 3, 4, 5, 0])))
    history = record(history, starts=np.array([0, 0]), lengths=np.array([2, 1]), offsets=np.array([1, 4]))
    assert history.prompt[1].tolist() == [0, 0, 0, 1, 1, 0] and not history.answer[1].any()
    assert history.prompt[0].all() and history.answer[0].all()
    history = record(history, starts=np.array([2, 9]), lengths=np.array([3, 1]), offsets=np.array([1, 4]))
    assert history.prompt[1].tolist() == [0, 0, 0, 1, 1, 1]
    history = sampling.record_answer(history, np.array([0, 1]), np.array([2, 2]), np.array([False, True]))
    assert history.answer[1].tolist() == [0, 0, 1, 0, 0, 0] and history.answer[0].tolist() == [1] * 6


def test_log_probabilities_are_the_models_own(logits):
    sampled = run(logits, temperature=2.0, frequency=1.0, logprobs=True)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert np.allclose(sampled.logprobs, np.take_along_axis(expected, sampled.tokens[:, None], axis=1)[:, 0], atol=1e-5)
    order = np.argsort(-logits, axis=1)[:, : sampling.TOP]
    assert (sampled.top_ids == order).all()
    assert np.allclose(sampled.top_logprobs, np.take_along_axis(expected, order, axis=1), atol=1e-5)


def test_rows_with_numbers_that_are_none_are_told(logits):
    broken = logits.copy()
    broken[1, 7], broken[2, 3] = np.nan, np.inf
    assert run(broken).ok.tolist() == [True, False, False, True]


def test_every_row_setting_is_one_value_a_row():
    sampler = idle_batch(3, 1, VOCAB).sampler
    assert all(len(getattr(sampler, field.name)) == 3 for field in dataclasses.fields(sampler))
