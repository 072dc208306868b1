"""Products with packed weights: equal to the twin, and bitwise the same for a row beside any others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native

from .arrays import DTYPES, normal, same_bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "m, k, n", [(1, 576, 960), (16, 64, 32), (3, 17, 33), (2, 1, 1), (15, 575, 100), (130, 48, 70), (0, 8, 8)]
)
def test_linear_equals_its_twin(kernels: native.Kernels, dtype: str, m: int, k: int, n: int) -> None:
    x, w = normal(0, m, k), jnp.asarray(normal(1, k, n), dtype)
    if dtype == "bfloat16" and kernels.isa == "avx512bf16":
        x = x.astype(jnp.bfloat16).astype(np.float32)
    got = jax.jit(kernels.linear)(x, native.pack_linear(w))
    np.testing.assert_allclose(got, native.twin_linear(x, w), rtol=1e-5, atol=1e-5 * k**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_linear_is_bitwise_the_same_beside_any_number_of_rows(kernels: native.Kernels, dtype: str) -> None:
    x, w = normal(0, 300, 75), native.pack_linear(jnp.asarray(normal(1, 75, 100), dtype))
    alone = jnp.concatenate([kernels.linear(x[i : i + 1], w) for i in range(40)])
    for m in [*range(2, 18), 28, 29, 39, 129, 300]:
        assert same_bits(kernels.linear(x[:m], w)[:40], alone[:m]), m
    assert same_bits(kernels.linear(x[7:50], w)[:20], alone[7:27])


def test_linear_keeps_leading_dimensions(kernels: native.Kernels) -> None:
    x, w = normal(0, 2, 3, 8), native.pack_linear(normal(1, 8, 5))
    assert same_bits(kernels.linear(x, w), kernels.linear(x.reshape(6, 8), w).reshape(2, 3, 5))


def test_x_is_rounded_to_nearest_even_where_it_is_rounded(kernels: native.Kernels) -> None:
    x = np.concatenate([normal(0, 4096), np.float32([0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3e38, 1e-30])])
    one = native.pack_linear(jnp.ones((1, 1), jnp.bfloat16))
    want = x.astype(jnp.bfloat16).astype(np.float32) if kernels.isa == "avx512bf16" else x
    np.testing.assert_array_equal(kernels.linear(x[:, None], one)[:, 0], want)


def test_weights_of_another_type_or_shape_are_refused(kernels: native.Kernels) -> None:
    with pytest.raises(TypeError, match="float16"):
        native.pack_linear(np.ones((2, 2), np.float16))
    packed = native.pack_linear(np.ones((4, 4), np.float32))
    with pytest.raises(Exception, match="packed for another shape"):
        jax.block_until_ready(kernels.linear(np.ones((1, 6), np.float32), native.Packed(packed.data, 6, 4)))
