"""The root-mean-square norm."""

import jax
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


def test_leading_dimensions_stay(kernels: native.Kernels) -> None:
    x, scale = normal(4, 2, 3, 5, 16), normal(5, 16)
    assert kernels.rms_norm(x, scale, 1e-6).shape == x.shape
