"""What is computed of each row on its own: the root-mean-square norm, and the rows of a table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native

from .arrays import normal, same_bits


@pytest.mark.parametrize("m, n", [(1, 1), (3, 7), (2, 16), (5, 100), (130, 576)])
def test_it_equals_its_twin(kernels: native.Kernels, m: int, n: int) -> None:
    x, scale = normal(0, m, n) * 20, normal(1, n)
    np.testing.assert_allclose(kernels.rms_norm(x, scale, 1e-5), native.twin_rms_norm(x, scale, 1e-5), rtol=2e-6, atol=1e-6)


def test_a_row_does_not_depend_on_the_others_nor_on_its_place(kernels: native.Kernels) -> None:
    x, scale = normal(2, 200, 100), normal(3, 100)
    norm = jax.jit(lambda x: kernels.rms_norm(x, scale, 1e-6))
    whole = norm(x)
    for rows in (1, 2, 4, 7, 63, 64):
        assert same_bits(norm(x[3 : 3 + rows]), whole[3 : 3 + rows])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedded_tokens_are_rows_of_the_table(kernels: native.Kernels, dtype: str) -> None:
    table = jnp.asarray(normal(6, 300, 70), dtype)
    tokens = jnp.int32([[0, 299, 5], [5, 17, 0]])
    got = jax.jit(kernels.embed)(table, tokens)
    assert got.shape == (2, 3, 70) and same_bits(got, table[tokens].astype(jnp.float32))
    assert same_bits(kernels.embed(table, jnp.int32([-1, 300])), table[jnp.int32([0, 299])].astype(jnp.float32)), "the nearest row"


def test_leading_dimensions_stay(kernels: native.Kernels) -> None:
    x, scale = normal(4, 2, 3, 5, 16), normal(5, 16)
    assert kernels.rms_norm(x, scale, 1e-6).shape == x.shape
