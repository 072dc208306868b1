"""Products with packed weights: equal to the twin, and bitwise the same for a row beside any others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native

from .arrays import DTYPES, ROUNDING, normal, same_bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "m, k, n", [(1, 576, 960), (16, 64, 32), (3, 17, 33), (2, 1, 1), (15, 575, 100), (130, 48, 70), (29, 1536, 130), (25, 4100, 20), (0, 8, 8)]
)
def test_linear_equals_its_twin(kernels: native.Kernels, dtype: str, m: int, k: int, n: int) -> None:
    x, w = normal(0, m, k), jnp.asarray(normal(1, k, n), dtype)
    if dtype == "bfloat16" and kernels.isa in ROUNDING:
        x = x.astype(jnp.bfloat16).astype(np.float32)
    packed = kernels.pack_linear(w)
    error = 4e-3 if packed.data.dtype == jnp.float16 else 1e-5
    np.testing.assert_allclose(jax.jit(kernels.linear)(x, packed), native.twin_linear(x, w), rtol=error, atol=error * k**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_linear_is_bitwise_the_same_beside_any_number_of_rows(kernels: native.Kernels, dtype: str) -> None:
    x, w = normal(0, 300, 75), kernels.pack_linear(jnp.asarray(normal(1, 75, 100), dtype))
    alone = jnp.concatenate([kernels.linear(x[i : i + 1], w) for i in range(40)])
    for m in [*range(2, 18), 28, 29, 39, 129, 300]:
        assert same_bits(kernels.linear(x[:m], w)[:40], alone[:m]), m
    assert same_bits(kernels.linear(x[7:50], w)[:20], alone[7:27])


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_so_among_the_smallest_numbers(kernels: native.Kernels, dtype: str) -> None:
    x, w = normal(0, 20, 75) * 1e-19, kernels.pack_linear(jnp.asarray(normal(1, 75, 40) * 1e-20, dtype))
    whole = kernels.linear(x, w)
    assert all(same_bits(kernels.linear(x[i : i + m], w), whole[i : i + m]) for m in (1, 2, 3) for i in range(17))


def test_linear_keeps_leading_dimensions(kernels: native.Kernels) -> None:
    x, w = normal(0, 2, 3, 8), kernels.pack_linear(normal(1, 8, 5))
    assert same_bits(kernels.linear(x, w), kernels.linear(x.reshape(6, 8), w).reshape(2, 3, 5))


def test_x_is_rounded_to_nearest_even_where_it_is_rounded(kernels: native.Kernels) -> None:
    x = np.concatenate([normal(0, 4096), np.float32([0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3e38, 1e-30])])
    one = kernels.pack_linear(jnp.ones((1, 1), jnp.bfloat16))
    want = x.astype(jnp.bfloat16).astype(np.float32) if kernels.isa in ROUNDING else x
    if kernels.isa == "avx512fp16":  # after scaling, so that its range is that of float32
        fraction, exponent = np.frexp(x)
        want = np.ldexp(fraction.astype(np.float16).astype(np.float32), exponent)
    np.testing.assert_array_equal(kernels.linear(x[:, None], one)[:, 0], want)


def test_weights_of_another_type_or_shape_are_refused(kernels: native.Kernels) -> None:
    with pytest.raises(TypeError, match="float16"):
        kernels.pack_linear(np.ones((2, 2), np.float16))
    packed = kernels.pack_linear(np.ones((4, 4), np.float32))
    with pytest.raises(Exception, match="packed for another shape"):
        jax.block_until_ready(kernels.linear(np.ones((1, 6), np.float32), native.Packed(packed.data, 6, 4)))


def test_sums_of_halves_are_closer_than_products_of_bfloat16(kernels: native.Kernels) -> None:
    if kernels.isa != "avx512fp16":
        pytest.skip("adds up in float32")
    x, w = normal(0, 64, 1536), jnp.asarray(normal(1, 1536, 96) * 0.02, jnp.bfloat16)
    exact = x.astype(np.float64) @ np.asarray(w, np.float64)
    of_bfloat16 = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) @ np.asarray(w, np.float64)
    error, allowed = (np.sqrt(np.mean((got - exact) ** 2)) for got in (kernels.linear(x, kernels.pack_linear(w)), of_bfloat16))
    assert error < 0.7 * allowed


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_rows_of_any_size_keep_their_digits(kernels: native.Kernels, size: float) -> None:
    x, w = normal(0, 5, 200), jnp.asarray(normal(1, 200, 64), jnp.bfloat16)
    rows = x.copy()
    rows[1:3] *= np.float32(size)
    rows[3, 7] = 1e4  # one value far above the others
    got = np.asarray(kernels.linear(rows, kernels.pack_linear(w)), np.float64)
    want = rows.astype(np.float64) @ np.asarray(w, np.float64)
    error = np.sqrt(np.mean((got - want) ** 2, axis=1)) / np.sqrt(np.mean(want**2, axis=1))
    assert (error < 4e-3).all(), error


def test_what_is_not_finite_stays_in_its_row(kernels: native.Kernels) -> None:
    x, w = normal(0, 4, 70), kernels.pack_linear(jnp.asarray(normal(1, 70, 40), jnp.bfloat16))
    spoiled = x.copy()
    spoiled[1, 3], spoiled[2, 5] = np.nan, np.inf
    got = np.asarray(kernels.linear(spoiled, w))
    assert not np.isfinite(got[1:3]).any()
    assert same_bits(got[::3], kernels.linear(x, w)[::3])


def test_weights_too_large_for_halves_stay_bfloat16(kernels: native.Kernels) -> None:
    w = jnp.asarray(normal(1, 40, 33), jnp.bfloat16).at[3, 4].set(3e5)
    x = np.ones((2, 40), np.float32)
    packed = kernels.pack_linear(w)
    assert packed.data.dtype == jnp.uint32
    np.testing.assert_allclose(kernels.linear(x, packed), native.twin_linear(x, w), rtol=1e-5, atol=1e-3)


def test_halves_are_refused_by_a_set_without_them(kernels: native.Kernels) -> None:
    packed = native.pack_linear(jnp.ones((4, 4), jnp.bfloat16), kernels.panel, halves=True)
    if kernels.isa == "avx512fp16":
        np.testing.assert_array_equal(kernels.linear(np.ones((1, 4), np.float32), packed), 4)
    else:
        with pytest.raises(Exception, match=f"can't be read by {kernels.isa}"):
            jax.block_until_ready(kernels.linear(np.ones((1, 4), np.float32), packed))
