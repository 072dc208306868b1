"""What training computes with the kernels, against the gradients that JAX finds of the plain form."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native
from jaxlora.model import attend_whole, rms_norm

from .arrays import DTYPES, ROUNDING, normal, same_bits

Array = jax.Array


def slopes(function: Callable[..., Array], *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    """The result, and the gradients of a sum of it with weights that differ everywhere."""
    result, back = jax.vjp(function, *inputs)
    return result, back(jnp.asarray(normal(99, *result.shape)))


def assert_close(got: Any, want: Any, share: float = 2e-6) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=share * float(jnp.abs(b).max()))


# Batch, tokens, heads, key/value heads, head size, window, whether there are segments.
ATTENTION = [
    (1, 1, 1, 1, 16, 0, False),
    (2, 7, 4, 2, 16, 0, False),
    (1, 57, 3, 1, 48, 0, True),
    (2, 130, 9, 3, 64, 0, False),
    (1, 130, 4, 4, 80, 13, True),
    (2, 90, 2, 1, 128, 60, False),
    (3, 100, 6, 2, 64, 0, True),
]


@pytest.mark.parametrize("batch, length, heads, kv, size, window, segmented", ATTENTION)
def test_attention_and_its_gradient(
    kernels: native.Kernels, batch: int, length: int, heads: int, kv: int, size: int, window: int, segmented: bool
) -> None:
    q, k, v = (jnp.asarray(normal(at, batch, length, count, size)) * 2 for at, count in enumerate((heads, kv, kv)))
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (batch, length)))) if segmented else None
    ours = slopes(lambda q, k, v: native.causal_attention(q, k, v, segments, scale=size**-0.5, window=window), q, k, v)
    assert_close(ours, slopes(lambda q, k, v: attend_whole(q, k, v, window, segments), q, k, v))


def test_attention_does_not_look_ahead_nor_into_other_segments(kernels: native.Kernels) -> None:
    q, k, v = (jnp.asarray(normal(at, 1, 80, count, 32)) for at, count in enumerate((4, 2, 2)))
    segments = jnp.repeat(jnp.arange(2), 40)[None]
    attend = jax.jit(lambda k, v: native.causal_attention(q, k, v, segments, scale=0.2))
    plain = attend(k, v)
    for cut, others in ((50, [slice(0, 40), slice(50, 80)]), (20, [slice(20, 80)])):
        k_other, v_other = k, v
        for at in others:
            k_other, v_other = k_other.at[:, at].set(100.0), v_other.at[:, at].set(-7.0)
        seen = slice(40, cut) if cut > 40 else slice(0, cut)
        assert same_bits(attend(k_other, v_other)[:, seen], plain[:, seen])


def test_attention_of_numbers_that_are_none_tells(kernels: native.Kernels) -> None:
    q, k, v = (jnp.asarray(normal(at, 1, 20, 2, 16)) for at in range(3))
    found = native.causal_attention(q, k.at[0, 3, 0, 0].set(jnp.nan), v, scale=0.25)
    assert jnp.isnan(found[0, 3:, 0]).all() and jnp.isfinite(found[0, :3]).all() and jnp.isfinite(found[0, :, 1]).all()


# Rows, inputs, outputs, rank. Widths that are no multiples of 16 take the plain form.
LINEAR = [(1, 16, 16, 1), (7, 32, 48, 3), (130, 576, 192, 16), (57, 64, 96, 33), (20, 75, 70, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, k, n, rank", LINEAR)
def test_a_linear_layer_with_an_adapter_and_its_gradient(
    kernels: native.Kernels, m: int, k: int, n: int, rank: int, dtype: str
) -> None:
    x, a, b = jnp.asarray(normal(0, m, k)), jnp.asarray(normal(1, rank, k)), jnp.asarray(normal(2, n, rank))
    w = (jnp.asarray(normal(3, k, n)) / k**0.5).astype(dtype)
    packed, back = (native.pack_linear(side, kernels.panel) for side in (w, w.T))
    ours = slopes(lambda x, a, b: native.adapted_linear(x, packed, back, a, b, 0.7), x, a, b)
    plain = lambda x, a, b: native.twin_linear(x, w) + 0.7 * native.twin_linear(native.twin_linear(x, a.T), b.T)
    rounded = dtype == "bfloat16" and kernels.isa in ROUNDING  # x and slopes too
    assert_close(ours, slopes(plain, x, a, b), 1e-2 if rounded else 2e-6)


@pytest.mark.parametrize("m, k, n, rank", LINEAR)
def test_dropout_is_that_of_plain_jax(kernels: native.Kernels, m: int, k: int, n: int, rank: int) -> None:
    x, a, b = jnp.asarray(normal(0, m, k)), jnp.asarray(normal(1, rank, k)), jnp.asarray(normal(2, n, rank))
    w = jnp.asarray(normal(3, k, n)) / k**0.5
    packed, back = (native.pack_linear(side, kernels.panel) for side in (w, w.T))
    dropout = native.Dropout(jnp.array([5, 6], jnp.uint32), jnp.uint32(7), 0.6)
    ours = slopes(lambda x, a, b: native.adapted_linear(x, packed, back, a, b, 0.7, dropout), x, a, b)
    plain = lambda x, a, b: native.twin_linear(x, w) + 0.7 * native.twin_linear(native.twin_linear(dropout.apply(x), a.T), b.T)
    assert_close(ours, slopes(plain, x, a, b))


# Tokens, inputs, vocabulary: more of both than a call computes at a time, and sizes that no vector or pair divides.
LOG_PROBS = [(1, 16, 2), (20, 75, 70), (7, 32, 2049), (300, 48, 4100)]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, k, n", LOG_PROBS)
def test_log_probs_and_their_gradient(kernels: native.Kernels, m: int, k: int, n: int, dtype: str, biased: bool) -> None:
    x, w = jnp.asarray(normal(0, m, k)), jnp.asarray(normal(1, k, n)).astype(dtype)
    packed, back = (native.pack_linear(side, kernels.panel) for side in (w, w.T))
    bias = jnp.asarray(normal(2, n)) if biased else None
    targets = np.random.default_rng(3).integers(0, n, m)
    targets[1::3] = -1
    temperature = jnp.float32(0.7)

    def plain(x: Array) -> Array:
        found = jax.nn.log_softmax((native.twin_linear(x, w) + (bias if biased else 0)) / temperature)
        return jnp.where(targets < 0, 0.0, found[jnp.arange(m), targets])

    log_probs = lambda x: native.frozen_log_probs(x, packed, back, bias, jnp.asarray(targets), temperature)
    ours = slopes(log_probs, x)
    rounded = dtype == "bfloat16" and kernels.isa in ROUNDING  # x and slopes too
    assert_close(ours, slopes(plain, x), 2e-2 if rounded else 2e-6)
    assert same_bits(log_probs(x), ours[0]) and not ours[0][targets < 0].any() and not ours[1][0][targets < 0].any()


def test_a_token_has_the_log_prob_that_it_has_alone(kernels: native.Kernels) -> None:
    x, w = jnp.asarray(normal(0, 150, 48)), jnp.asarray(normal(1, 48, 4100))
    packed, back = (native.pack_linear(side, kernels.panel) for side in (w, w.T))
    targets = jnp.arange(150) * 27
    compute = lambda x, targets: slopes(lambda x: native.frozen_log_probs(x, packed, back, None, targets, jnp.float32(1)), x)
    together = compute(x, targets)[0]
    for row in (0, 127, 149):
        assert same_bits(compute(x[row : row + 1], targets[row : row + 1])[0], together[row : row + 1])


def test_log_probs_of_numbers_that_are_none_tell(kernels: native.Kernels) -> None:
    x, w = jnp.asarray(normal(0, 20, 32)), jnp.asarray(normal(1, 32, 100))
    packed, back = (native.pack_linear(side, kernels.panel) for side in (w, w.T))
    for value in (jnp.nan, jnp.inf):
        found, (slope,) = slopes(
            lambda x: native.frozen_log_probs(x, packed, back, None, jnp.arange(20), jnp.float32(1)), x.at[3, 5].set(value)
        )
        told = ~np.isfinite(found)
        assert told[3] and told.sum() == 1 and not np.isfinite(slope[3]).all() and np.isfinite(np.delete(slope, 3, 0)).all()


def test_a_target_that_is_no_token_is_refused(kernels: native.Kernels) -> None:
    w = jnp.asarray(normal(1, 32, 100))
    packed, back = (native.pack_linear(side, kernels.panel) for side in (w, w.T))
    with pytest.raises(jax.errors.JaxRuntimeError, match="target"):
        jax.block_until_ready(native.frozen_log_probs(jnp.zeros((1, 32)), packed, back, None, jnp.int32([100]), jnp.float32(1)))


# With so many rows threads share the work; 35 is no whole vector.
@pytest.mark.parametrize("shape", [(1, 3), (3, 5, 35), (600, 64)])
def test_norm_and_gate_and_their_gradients(kernels: native.Kernels, shape: tuple[int, ...]) -> None:
    x, up, scale = jnp.asarray(normal(0, *shape)) * 5, jnp.asarray(normal(1, *shape)), jnp.asarray(normal(2, shape[-1])) + 1
    ours = slopes(lambda x: native.frozen_norm(x, scale, 1e-5), x)
    assert_close(ours, slopes(lambda x: rms_norm(x, scale, 1e-5), x))
    assert same_bits(ours[0], native.Kernels.rms_norm(x, scale, 1e-5))
    assert_close(slopes(native.swiglu, x, up), slopes(lambda gate, up: jax.nn.silu(gate) * up, x, up))


def test_an_adapter_that_no_row_used_has_no_gradient(kernels: native.Kernels) -> None:
    w = jnp.asarray(normal(0, 576, 192))
    packed, back = (native.pack_linear(side, kernels.panel) for side in (w, w.T))
    function = lambda x, a, b: native.adapted_linear(x, packed, back, a, b, 0.7)
    slopes(function, *(jnp.asarray(normal(at, *shape)) for at, shape in enumerate([(130, 576), (16, 576), (192, 16)])))  # memory that is not zero
    _, (x, a, b) = slopes(function, jnp.zeros((0, 576)), jnp.asarray(normal(1, 16, 576)), jnp.asarray(normal(2, 192, 16)))
    assert x.shape == (0, 576) and not a.any() and not b.any()


def test_a_frozen_linear_layer_gives_the_same_bits_as_the_one_that_serves(kernels: native.Kernels) -> None:
    x, w = jnp.asarray(normal(0, 3, 5, 75)), jnp.asarray(normal(1, 75, 70))
    packed, back = (native.pack_linear(side, kernels.panel) for side in (w, w.T))
    y, (slope,) = slopes(lambda x: native.frozen_linear(x, packed, back), x)
    assert same_bits(y, native.Kernels.linear(x, packed))
    assert_close(slope, native.twin_linear(jnp.asarray(normal(99, 3, 5, 70)), w.T))


def test_results_are_the_same_every_time(kernels: native.Kernels) -> None:
    q, k, v = (jnp.asarray(normal(at, 2, 130, count, 64)) for at, count in enumerate((6, 2, 2)))
    attend = jax.jit(lambda q, k, v: slopes(lambda *qkv: native.causal_attention(*qkv, scale=0.1), q, k, v))
    w = jnp.asarray(normal(3, 64, 96))
    packed, back = (native.pack_linear(side, kernels.panel) for side in (w, w.T))
    inputs = jnp.asarray(normal(4, 200, 64)), jnp.asarray(normal(5, 8, 64)), jnp.asarray(normal(6, 96, 8))
    linear = jax.jit(lambda *xab: slopes(lambda x, a, b: native.adapted_linear(x, packed, back, a, b, 2.0), *xab))
    first = jax.tree.leaves((attend(q, k, v), linear(*inputs)))
    for _ in range(10):
        assert all(map(same_bits, jax.tree.leaves((attend(q, k, v), linear(*inputs))), first))
