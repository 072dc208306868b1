"""What a product does before and after itself: norm, gate, sum, adapters. The same bits as one after the other."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native
from jaxlora.int8 import quantize
from jaxlora.native.twins import twin_swiglu

from .arrays import normal, same_bits

WEIGHTS = ("float32", "bfloat16", "int8")


def packed(kernels: native.Kernels, dtype: str, k: int, n: int) -> native.Packed:
    w = normal(k + n, k, n)
    return kernels.pack_linear(quantize(w) if dtype == "int8" else jnp.asarray(w, dtype))


def swiglu(kernels: native.Kernels, x: np.ndarray) -> jax.Array:
    return kernels.linear(x, kernels.pack_linear(np.eye(x.shape[1] // 2, dtype=np.float32)), gated=True)


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("m, k, n", [(1, 576, 64), (3, 7, 33), (40, 75, 100), (200, 130, 40)])
def test_each_part_is_what_it_is_alone(kernels: native.Kernels, dtype: str, m: int, k: int, n: int) -> None:
    w, x, onto = packed(kernels, dtype, k, n), normal(0, m, 2 * k), normal(1, m, n)
    norm = normal(2, k), 1e-5
    alone = kernels.linear(x[:, :k], w)
    assert same_bits(kernels.linear(x[:, :k], w, onto=onto), onto + alone)
    normed = kernels.linear(kernels.rms_norm(x[:, :k], *norm), w)
    assert same_bits(kernels.linear(x[:, :k], w, norm=norm), normed) and not same_bits(normed, alone)
    assert same_bits(kernels.linear(x, w, gated=True), kernels.linear(swiglu(kernels, x), w))


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("bank_dtype", WEIGHTS)
def test_adapters_read_what_the_product_reads(kernels: native.Kernels, dtype: str, bank_dtype: str) -> None:
    k, n, rank = 70, 45, 16
    w, onto, norm = packed(kernels, dtype, k, n), normal(1, 30, n), (normal(2, k), 1e-5)
    values = normal(3, 2, rank * (k + n)) * 50
    bank = jnp.asarray(values, jnp.float32 if bank_dtype == "int8" else bank_dtype)
    if bank_dtype == "int8":
        bank = jnp.concatenate([values.astype(np.int8), np.full((2, rank), 1e-3, np.float32).view(np.int8)], axis=1)
    slots = jnp.arange(30, dtype=jnp.int32) % 3 - 1
    adapters = native.LoraRows(bank, jnp.int32(0), slots, jnp.int32([16, 8]), (native.LoraModule(0, k, 2, n - 5),), rank)
    nothing = kernels.pack_linear(np.zeros((k, n), np.float32))
    gate_up = normal(4, 30, 2 * k)
    for x, before, read in (
        (gate_up[:, :k], {}, gate_up[:, :k]),
        (gate_up[:, :k], {"norm": norm}, kernels.rms_norm(gate_up[:, :k], *norm)),
        (gate_up, {"gated": True}, swiglu(kernels, gate_up)),
    ):
        product = kernels.linear(read, w, onto=onto)
        got = kernels.linear(x, w, onto=onto, adapters=adapters, **before)
        assert same_bits(got, kernels.linear(read, nothing, onto=product, adapters=adapters))
        assert same_bits(got[::3], product[::3]) and not same_bits(got[1:], product[1:])


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_is_bitwise_the_same_beside_any_others(kernels: native.Kernels, dtype: str, gated: bool) -> None:
    k, n = 100, 70
    w, x, onto = packed(kernels, dtype, k, n), normal(0, 300, k * (1 + gated)), normal(1, 300, n)
    around: dict[str, Any] = {"gated": True} if gated else {"norm": (normal(2, k), 1e-6)}
    step: Callable[..., jax.Array] = jax.jit(lambda x, onto: kernels.linear(x, w, onto=onto, **around))
    whole = step(x, onto)
    for first, rows in ((0, 1), (3, 2), (7, 15), (50, 64), (100, 129)):
        assert same_bits(step(x[first : first + rows], onto[first : first + rows]), whole[first : first + rows])


@pytest.mark.parametrize("dtype", WEIGHTS)
def test_a_sum_takes_the_place_of_what_it_is_added_to(kernels: native.Kernels, dtype: str) -> None:
    w, onto = packed(kernels, dtype, 16, 40), jnp.array(normal(0, 2, 40), copy=True)
    where = onto.unsafe_buffer_pointer()
    step = jax.jit(lambda x, onto: kernels.linear(x, w, onto=onto), donate_argnums=1)
    assert step(normal(1, 2, 16), onto).unsafe_buffer_pointer() == where


@pytest.mark.parametrize("m, n", [(1, 1), (3, 7), (2, 16), (130, 100)])
def test_the_gate_equals_its_twin(kernels: native.Kernels, m: int, n: int) -> None:
    x = normal(0, m, 2 * n) * 20
    np.testing.assert_allclose(swiglu(kernels, x), twin_swiglu(x), rtol=1e-5, atol=1e-30)


def test_the_gate_of_a_value_does_not_depend_on_its_place(kernels: native.Kernels) -> None:
    gate, up = normal(5, 40), normal(6, 40)
    whole = swiglu(kernels, np.concatenate([gate, up])[None])
    for n in (1, 5, 16, 33):
        rows = np.broadcast_to(np.concatenate([gate[:n], up[:n]]), (9, 2 * n))
        assert all(same_bits(row, whole[0, :n]) for row in swiglu(kernels, rows))


def test_the_gate_keeps_what_is_not_finite(kernels: native.Kernels) -> None:
    got = swiglu(kernels, np.float32([[np.nan, 1], [1, np.nan], [np.inf, 1], [200, 1], [-200, 1]]))[:, 0]
    assert np.isnan(got[:2]).all() and got[2:].tolist() == [np.inf, 200, 0]


def test_it_equals_the_twin_with_everything(kernels: native.Kernels) -> None:
    w, x, onto, norm = normal(0, 70, 33), normal(1, 2, 5, 70), normal(2, 2, 5, 33), (normal(3, 70), 1e-5)
    bank = normal(4, 2, 16 * 110)
    adapters = native.LoraRows(bank, jnp.int32(0), jnp.arange(10) % 2, jnp.int32([16, 8]), (native.LoraModule(0, 70, 0, 33),), 16)
    options = dict(norm=norm, onto=onto, adapters=adapters)
    got = jax.jit(functools.partial(kernels.linear, **options))(x, kernels.pack_linear(w))
    want = native.twin_linear(x.reshape(10, 70), w, **options | {"onto": onto.reshape(10, 33)}).reshape(2, 5, 33)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_what_does_not_fit_is_refused(kernels: native.Kernels) -> None:
    w, x = packed(kernels, "float32", 16, 40), normal(1, 2, 16)
    for around, message in (
        ({"norm": (normal(2, 15), 1e-5)}, r"norm takes x \[m, k\] and scale \[k\]"),
        ({"norm": (normal(2, 8), 1e-5), "gated": True}, "norm takes"),
        ({"gated": True}, "packed for another shape"),
    ):
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(kernels.linear(x, w, **around))
    with pytest.raises(Exception, match=r"gate takes x \[m, 2 k\]"):
        jax.block_until_ready(kernels.linear(normal(1, 2, 33), w, gated=True))


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("m, live", [(40, 40), (40, 17), (200, 130), (200, 3), (16, 1), (16, 0)])
def test_rows_that_are_not_live_are_not_computed_and_change_nothing(kernels: native.Kernels, dtype: str, m: int, live: int) -> None:
    k, n, rank = 70, 45, 8
    w, x, onto = packed(kernels, dtype, k, n), normal(0, m, k), normal(1, m, n)
    slots = jnp.where(jnp.arange(m) < live, jnp.arange(m, dtype=jnp.int32) % 3 - 1, -1)
    bank = jnp.asarray(normal(3, 2, rank * (k + n + 8)))
    adapters = native.LoraRows(bank, jnp.int32(0), slots, jnp.int32([8, 8]), (native.LoraModule(0, k, 2, n - 5),), rank)
    around = {"norm": (normal(2, k), 1e-5), "adapters": adapters}
    step = jax.jit(lambda x, onto, live: kernels.linear(x, w, onto=onto, live=live, **around))
    whole = kernels.linear(x[:live], w, onto=onto[:live], norm=around["norm"], adapters=adapters._replace(row_slot=slots[:live]))
    x[live:] = np.nan
    got = step(x, onto, jnp.int32(live))
    assert same_bits(got[:live], whole) and same_bits(got[live:], onto[live:])
    alone, cleared = (jax.jit(lambda x, live: kernels.linear(x, w, live=live, cleared=cleared))(x, jnp.int32(live)) for cleared in (False, True))
    assert same_bits(alone[:live], kernels.linear(x[:live], w)) and same_bits(cleared[:live], alone[:live])
    assert not np.asarray(cleared[live:]).any()
    twin = native.twin_linear(np.nan_to_num(x), np.zeros((k, n), np.float32), onto=onto, live=jnp.int32(live), **around)
    np.testing.assert_array_equal(twin[live:], onto[live:])


@pytest.mark.parametrize("live, slots, message", [(5, [0] * 4, "more rows are live"), (-1, [-1] * 4, "more rows are live"), (3, [0] * 4, "has an adapter")])
def test_rows_that_cannot_be_live_are_refused(kernels: native.Kernels, live: int, slots: list[int], message: str) -> None:
    w, bank = kernels.pack_linear(normal(0, 8, 8)), jnp.zeros((1, 128))
    adapters = native.LoraRows(bank, jnp.int32(0), jnp.int32(slots), jnp.int32([8]), (native.LoraModule(0, 8, 0, 8),), 8)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        kernels.linear(normal(1, 4, 8), w, adapters=adapters, live=jnp.int32(live)).block_until_ready()
