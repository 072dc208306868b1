"""bfloat16 weights in 12 bits: the same products, bit for bit, as of the weights themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native
from jaxlora.native.compact import pack_compact

from .arrays import normal, same_bits


@pytest.fixture
def compact(kernels: native.Kernels) -> native.Kernels:
    if kernels.isa != "amxbf16":
        pytest.skip(f"{kernels.isa} reads no weights in 12 bits")
    return kernels


def both(kernels: native.Kernels, w: jax.Array) -> tuple[native.Packed, native.Packed]:
    packed, codes = native.pack_linear(w, kernels.panel), kernels.pack_linear(w)
    assert (packed.data.dtype, codes.data.dtype) == (jnp.uint32, jnp.uint16)
    return packed, codes


@pytest.mark.parametrize("k, n", [(576, 960), (1536, 100), (75, 70), (64, 32), (33, 1), (1, 1)])
def test_products_are_the_same_bit_for_bit(compact: native.Kernels, k: int, n: int) -> None:
    w = jnp.asarray(normal(1, k, n) * 0.05, jnp.bfloat16)
    packed, codes = both(compact, w)
    for m in (0, 1, 2, 3, 16, 17, 32, 33, 130):
        x = normal(m, m, k)
        assert same_bits(compact.linear(x, codes), compact.linear(x, packed)), m


def test_weights_of_any_size_are_kept(compact: native.Kernels) -> None:
    few = [0.0, -0.0, 1e-30, -1e-38, 2e-40, 11.0, -11.0, 2.0**-9, -(2.0**-10)]
    w = jnp.asarray(normal(1, 96, 70), jnp.bfloat16).at[jnp.arange(9) * 7, jnp.arange(9)].set(jnp.asarray(few, jnp.bfloat16))
    packed, codes = both(compact, w)
    x = np.concatenate([np.eye(96, dtype=np.float32), np.ones((1, 96), np.float32)])
    assert same_bits(compact.linear(x, codes), compact.linear(x, packed))


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_sizes_of_all_weights_do_not_matter(compact: native.Kernels, size: float) -> None:
    packed, codes = both(compact, jnp.asarray(normal(1, 80, 40) * size, jnp.bfloat16))
    x = normal(0, 5, 80)
    assert same_bits(compact.linear(x, codes), compact.linear(x, packed))


def test_a_panel_of_zeros(compact: native.Kernels) -> None:
    _, codes = both(compact, jnp.zeros((70, 40), jnp.bfloat16))
    np.testing.assert_array_equal(compact.linear(normal(0, 3, 70), codes), 0)


def test_a_list_may_be_full_but_no_fuller() -> None:
    k, room = 64, (128 - 16) // 8 - 1
    w = np.ones((k, 32), np.float32)
    for count in (room, room + 1):
        w[:count, 3] = 1e-9
        packed = native.pack_linear(jnp.asarray(w, jnp.bfloat16), 32)
        assert (pack_compact(packed.data, k) is None) == (count > room)


def test_weights_of_all_sizes_stay_as_they_are(kernels: native.Kernels) -> None:
    w = jnp.asarray(normal(1, 64, 40) * 10.0 ** np.random.default_rng(0).integers(-9, 1, (64, 40)), jnp.bfloat16)
    assert native.pack_linear(w, 32, compact=True).data.dtype == jnp.uint32
    np.testing.assert_allclose(kernels.linear(np.ones((2, 64), np.float32), kernels.pack_linear(w)), native.twin_linear(np.ones((2, 64), np.float32), w), rtol=5e-3, atol=1e-2)


def test_a_set_without_them_refuses_them(kernels: native.Kernels) -> None:
    packed = native.pack_linear(jnp.ones((4, 4), jnp.bfloat16), 32, compact=True)
    assert packed.data.dtype == jnp.uint16
    x = np.ones((1, 4), np.float32)
    if kernels.isa == "amxbf16":
        np.testing.assert_array_equal(kernels.linear(x, packed), 4)
        with pytest.raises(Exception, match="packed for another shape"):
            jax.block_until_ready(kernels.linear(np.ones((1, 70), np.float32), native.Packed(packed.data, 70, 4)))
    else:
        with pytest.raises(Exception, match=f"can't be read by {kernels.isa}"):
            jax.block_until_ready(kernels.linear(x, packed))
