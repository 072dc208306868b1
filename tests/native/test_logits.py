"""Argmax and log-sum-exp of rows of logits."""

import numpy as np
import pytest

from jaxlora import native

from .arrays import normal


@pytest.mark.parametrize("m, n", [(1, 1), (3, 7), (2, 16), (5, 1000), (17, 49152)])
def test_argmax_and_logsumexp_equal_their_twins(kernels: native.Kernels, m: int, n: int) -> None:
    logits = normal(0, m, n) * 20
    for got, want in zip(kernels.argmax_logsumexp(logits), native.twin_argmax_logsumexp(logits)):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_argmax_takes_the_first_of_equals(kernels: native.Kernels) -> None:
    logits = np.full((3, 40), -2, np.float32)
    logits[1, [5, 20, 39]] = 7
    logits[2, 38:] = 7
    assert kernels.argmax_logsumexp(logits)[0].tolist() == [0, 5, 38]
