"""Draws from filtered probabilities: the same tokens as the twin's, whose noise is JAX's own; each row as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native

from .arrays import normal

twin_draw = jax.jit(native.twin_draw)
ROWS = 40


def settings(rows: int = ROWS, **given: object) -> tuple[jax.Array, ...]:
    """temperature, top_k, top_p, min_p, keys and positions."""
    values = {"temperature": np.float32(0.9), "top_k": np.int32(0), "top_p": np.float32(1), "min_p": np.float32(0)}
    values = {name: np.resize(np.asarray(given.get(name, value), value.dtype), rows) for name, value in values.items()}
    keys = np.random.default_rng(3).integers(0, 1 << 32, (rows, 2), np.uint32)
    return (*map(jnp.asarray, values.values()), jnp.asarray(keys), jnp.arange(rows, dtype=jnp.int32) * 37)


@pytest.mark.parametrize("n", [1, 5, 33, 1000, 49152])
@pytest.mark.parametrize(
    "given",
    [
        {}, {"temperature": [0.2, 1e-9, 3]}, {"top_k": [1, 2, 50, 5000]}, {"top_p": [0.5, 0.9, 0.999, 1e-6]}, {"min_p": [0.02, 0.5, 1]},
        {"top_k": [40, 0], "top_p": [0.8, 0.95, 1], "min_p": [0.05, 0, 0, 0, 1e-9]},
    ],
)  # fmt: skip
def test_draws_are_those_of_the_twin(kernels: native.Kernels, n: int, given: dict) -> None:
    logits, rest = normal(n, ROWS, n) * 4, settings(**given)
    got, want = np.asarray(jax.jit(kernels.draw)(logits, *rest)), np.asarray(twin_draw(logits, *rest))
    # Logarithms differ in their last place, which may turn the choice between two that are all but equal.
    assert (got == want).sum() >= ROWS - 1
    assert n < 33 or len(set(want.tolist())) > 1


def test_draws_follow_the_distribution(kernels: native.Kernels) -> None:
    shares = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
    rows = 20_000
    tokens = kernels.draw(np.tile(np.log(shares), (rows, 1)), *settings(rows, temperature=1))
    assert np.abs(np.bincount(tokens, minlength=4) / rows - shares).max() < 0.012


@pytest.mark.parametrize("given, allowed", [({"top_k": 3}, {7, 11, 30}), ({"top_p": 0.6}, {7, 11}), ({"min_p": 0.5}, {7, 11})])
def test_nothing_is_drawn_that_is_left_out(kernels: native.Kernels, given: dict, allowed: set[int]) -> None:
    logits = np.full((2000, 37), -1, np.float32)
    logits[:, [7, 11, 30]] = [6, 5.5, 4]
    assert set(np.asarray(kernels.draw(logits, *settings(2000, temperature=1, **given))).tolist()) == allowed


def test_equals_at_a_threshold_stay_in(kernels: native.Kernels) -> None:
    logits = np.zeros((2000, 20), np.float32)
    logits[:, 3:8] = 9
    for given in ({"top_k": 2}, {"top_p": 0.3}, {"min_p": 1.0}):
        assert set(np.asarray(kernels.draw(logits, *settings(2000, **given))).tolist()) == set(range(3, 8))


def test_a_row_is_the_same_beside_any_others(kernels: native.Kernels) -> None:
    logits = normal(2, ROWS, 3001) * 3
    rest = settings(temperature=[0.7, 0, 1.5], top_k=[0, 30], top_p=[1, 0.9, 0.5], min_p=[0, 0, 0, 0.1])
    draw = jax.jit(kernels.draw)
    together = np.asarray(draw(logits, *rest))
    alone = [int(draw(logits[at : at + 1], *(value[at : at + 1] for value in rest))[0]) for at in range(ROWS)]
    assert together.tolist() == alone


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_whatever_the_logits_are_a_token_comes(kernels: native.Kernels, bad: float) -> None:
    logits = normal(5, ROWS, 100)
    logits[:, 50:] = bad
    for given in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}):
        for values in (logits, np.full_like(logits, bad)):
            tokens = np.asarray(kernels.draw(values, *settings(**given)))
            assert ((tokens >= 0) & (tokens < 100)).all()


def test_settings_of_another_shape_are_refused(kernels: native.Kernels) -> None:
    temperature, *rest = settings()
    with pytest.raises(jax.errors.JaxRuntimeError, match="draw takes logits"):
        kernels.draw(normal(0, ROWS, 20), temperature[1:], *rest).block_until_ready()
