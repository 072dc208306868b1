"""Products with int8 weights: equal to whole-number arithmetic in NumPy, and bitwise the same for a row beside any others and on any CPU."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native
from jaxlora.int8 import Int8, quantize
from jaxlora.int8_size import GROUP

from .arrays import normal, same_bits
from .conftest import ISAS

SHAPES = [(1, 576, 960), (16, 64, 32), (3, 17, 33), (2, 1, 1), (15, 575, 100), (130, 48, 70), (29, 1536, 130), (0, 8, 8)]


def weights(k: int, n: int) -> Int8:
    return quantize(normal(1, k, n) * np.exp(normal(2, 1, n)))


def product(x: np.ndarray, w: Int8) -> np.ndarray:
    """float64 [m, n] = x [m, k] @ w, with every group of a row of x rounded to 255 values."""
    (m, k), n = x.shape, w.shape[1]
    groups = np.pad(x, ((0, 0), (0, -k % GROUP))).reshape(m, -(-k // GROUP), GROUP)
    highest = np.abs(groups).max(axis=2, keepdims=True)
    rounded, scales = np.rint(groups * (np.float32(127) / highest)), highest / np.float32(127)
    values = np.pad(np.asarray(w.values, np.float64), ((0, -k % GROUP), (0, 0))).reshape(-(-k // GROUP), GROUP, n)
    return np.einsum("mgk,gkn,mg,gn->mn", rounded, values, scales[..., 0], np.asarray(w.scales, np.float64))


@pytest.mark.parametrize("m, k, n", SHAPES)
def test_products_are_those_of_whole_numbers(kernels: native.Kernels, m: int, k: int, n: int) -> None:
    x, w = normal(0, m, k), weights(k, n)
    got = jax.jit(kernels.linear)(x, kernels.pack_linear(w))
    sizes = np.max(np.asarray(w.scales, np.float64), axis=0) * 127  # of the weights of each column
    assert (np.abs(got - product(x, w)) <= 1e-5 * sizes * k**0.5).all()


@pytest.mark.parametrize("m, k, n", SHAPES)
def test_rounding_x_costs_less_than_a_hundredth(kernels: native.Kernels, m: int, k: int, n: int) -> None:
    x, w = normal(0, m, k), weights(k, n)
    got, want = kernels.linear(x, kernels.pack_linear(w)), native.twin_linear(x, w)
    assert np.linalg.norm(got - want) <= 0.01 * np.linalg.norm(want)


def test_a_row_is_bitwise_the_same_beside_any_number_of_rows(kernels: native.Kernels) -> None:
    x, w = normal(0, 300, 75), kernels.pack_linear(weights(75, 100))
    alone = jnp.concatenate([kernels.linear(x[i : i + 1], w) for i in range(40)])
    for m in [*range(2, 18), 28, 29, 39, 129, 300]:
        assert same_bits(kernels.linear(x[:m], w)[:40], alone[:m]), m
    assert same_bits(kernels.linear(x[7:50], w)[:20], alone[7:27])


def test_every_instruction_set_gives_the_same_bits(build_dir: pathlib.Path) -> None:
    x, w, found = normal(0, 20, 200), weights(200, 70), {}
    for isa in ISAS:
        if not isinstance(kernels := native.load(build_dir, isa), str):
            found[isa] = np.asarray(kernels.linear(x, kernels.pack_linear(w)))
    if len(found) < 2:
        pytest.skip("this CPU or compiler has fewer than two")
    first = next(iter(found.values()))
    assert all(same_bits(first, other) for other in found.values()), list(found)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_rows_of_any_size_keep_their_digits(kernels: native.Kernels, size: float) -> None:
    x, w = normal(0, 5, 200), weights(200, 64)
    rows = x.copy()
    rows[1:3] *= np.float32(size)
    rows[3, 7] = 1e4  # one value far above the others of its group
    got, want = np.asarray(kernels.linear(rows, kernels.pack_linear(w)), np.float64), product(rows, w)
    assert (np.linalg.norm(got - want, axis=1) < 1e-3 * np.linalg.norm(want, axis=1)).all()


def test_zeros_give_zeros(kernels: native.Kernels) -> None:
    x, w = normal(0, 3, 70), weights(70, 40)
    x[1] = 0
    w = Int8(w.values.at[:, 5].set(0), w.scales.at[:, 5].set(0))
    got = np.asarray(kernels.linear(x, kernels.pack_linear(w)))
    assert not got[1].any() and not got[:, 5].any() and got[0].any()


def test_what_is_not_finite_stays_in_its_row(kernels: native.Kernels) -> None:
    x, w = normal(0, 4, 70), kernels.pack_linear(weights(70, 40))
    spoiled = x.copy()
    spoiled[1, 3], spoiled[2, 69] = np.nan, np.inf
    got = np.asarray(kernels.linear(spoiled, w))
    assert not np.isfinite(got[1:3]).any()
    assert same_bits(got[::3], kernels.linear(x, w)[::3])


def test_weights_of_another_shape_are_refused(kernels: native.Kernels) -> None:
    packed = kernels.pack_linear(weights(70, 40))
    for k, n in ((10, 40), (130, 40), (70, 70)):
        with pytest.raises(Exception, match="packed for another shape"):
            jax.block_until_ready(kernels.linear(np.ones((1, k), np.float32), native.Packed(packed.data, k, n)))
