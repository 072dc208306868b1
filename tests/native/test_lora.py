"""Low-rank updates by adapter: equal to the twin, bitwise the same beside any others, in place, within their bounds."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native

from .arrays import normal, same_bits

Modules = tuple[native.LoraModule, ...]


def lora(
    kernels: native.Kernels, y: jax.Array, x: jax.Array, bank: jax.Array, slots: jax.Array, modules: Modules, rank: jax.Array | None = None
) -> jax.Array:
    """y with the updates alone."""
    adapters = native.LoraRows(bank, START, slots, RANKS if rank is None else rank, modules, MAX_RANK)
    return kernels.linear(x, kernels.pack_linear(np.zeros((x.shape[1], y.shape[1]), np.float32)), onto=y, adapters=adapters)


@functools.partial(jax.jit, static_argnames="modules")  # compiled once for all instruction sets
def twin_lora(y: jax.Array, x: jax.Array, bank: jax.Array, slots: jax.Array, modules: Modules) -> jax.Array:
    adapters = native.LoraRows(bank, START, slots, RANKS, modules, MAX_RANK)
    return native.twin_linear(x, np.zeros((x.shape[1], y.shape[1]), np.float32), onto=y, adapters=adapters)


DTYPES = ("float32", "bfloat16", "int8")
SLOTS, MAX_RANK = 5, 16
START = jnp.int32(7)  # what lies before it in a slot is not the adapter's
RANKS = jnp.int32([8, 0, 16, 3, 13])


def bank_for(k: int, widths: list[int], dtype: str, int8_step: float = 1 / 40) -> tuple[jax.Array, Modules]:
    """A bank whose unused ranks hold NaN, and modules side by side in y with a gap before the first."""
    modules, column, offset = [], 2, 0
    parts = [np.full((SLOTS, int(START)), 99, np.int8) if dtype == "int8" else np.full((SLOTS, int(START)), np.nan)]
    used = np.arange(MAX_RANK) < np.asarray(RANKS)[:, None]
    for width in widths:
        modules.append(native.LoraModule(offset, offset + MAX_RANK * k, column, width))
        for size in (k, width):
            values = normal(offset + size, SLOTS, MAX_RANK, size)
            if dtype == "int8":
                parts.append(np.rint(values / int8_step).clip(-127, 127).astype(np.int8))
            else:
                parts.append(np.where(used[:, :, None], values, np.nan))
            offset += MAX_RANK * size
        if dtype == "int8":
            scales = int8_step**2 * 2.0 ** np.random.default_rng(width).integers(-1, 2, (SLOTS, MAX_RANK))
            parts.append(np.where(used, scales, np.nan).astype(np.float32).view(np.int8))
            offset += MAX_RANK * 4
        column += width
    return jnp.asarray(np.concatenate([part.reshape(SLOTS, -1) for part in parts], axis=1), dtype), tuple(modules)


def round_values(bank: jax.Array) -> jax.Array:
    return bank if bank.dtype == jnp.int8 else jnp.round(bank)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "k, widths, rows",
    [(576, [576, 192, 192], [0]), (37, [11, 300], [2, -1, 2, 0, 1, 4, 3]), (8, [1], [-1, -1]), (64, [64], [4] * 20 + [2] * 3)],
)
def test_lora_equals_its_twin(kernels: native.Kernels, dtype: str, k: int, widths: list[int], rows: list[int]) -> None:
    bank, modules = bank_for(k, widths, dtype)
    y, x = normal(0, len(rows), sum(widths) + 3), normal(1, len(rows), k)
    rounded = (dtype, kernels.isa) == ("bfloat16", "avx512bf16")  # x, and what lies between A and B
    if rounded:
        x = x.astype(jnp.bfloat16).astype(np.float32)
    got = jax.jit(functools.partial(lora, kernels, modules=modules))(y, x, bank, jnp.int32(rows))
    want = twin_lora(y, x, bank, jnp.int32(rows), modules)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=(5e-2 if rounded else 1e-4) * k**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_whole_numbers_are_exact(kernels: native.Kernels, dtype: str) -> None:
    # Rounding to bfloat16 leaves whole numbers up to 256 as they are, so nothing may be off wherever values are rounded on their way.
    bank, modules = bank_for(576, [300, 33], dtype, int8_step=1)
    y, x, slots = np.round(normal(0, 7, 336)), np.round(normal(1, 7, 576)), jnp.int32([2, -1, 2, 0, 4, 3, 2])
    arguments = y, x, round_values(bank), slots
    want = twin_lora(*arguments, modules)
    assert np.abs(want).max() > 100
    np.testing.assert_array_equal(jax.jit(functools.partial(lora, kernels, modules=modules))(*arguments), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_lora_is_bitwise_the_same_beside_any_others(kernels: native.Kernels, dtype: str) -> None:
    bank, modules = bank_for(100, [70, 33], dtype)
    y, x = normal(0, 64, 106), normal(1, 64, 100)
    slots = np.random.default_rng(5).integers(-1, SLOTS, 64).astype(np.int32)
    step = jax.jit(functools.partial(lora, kernels, modules=modules))
    alone = np.concatenate([step(y[i : i + 1], x[i : i + 1], bank, slots[i : i + 1]) for i in range(64)])
    for order in (np.arange(64), np.argsort(slots), np.random.default_rng(6).permutation(64)[:23]):
        assert same_bits(step(y[order], x[order], bank, slots[order]), alone[order])
    assert same_bits(alone[slots < 0], y[slots < 0])


def test_a_call_is_told_from_those_before_it_that_differ_in_one_thing(kernels: native.Kernels) -> None:
    bank, modules = bank_for(16, [16], "float32")
    twice = jnp.concatenate([bank, -2 * bank], axis=1)
    y, x = normal(0, 4, 32), normal(1, 4, 16)

    @functools.partial(jax.jit, static_argnames=("linear", "module"))
    def step(linear: Callable[..., jax.Array], slots: jax.Array, ranks: jax.Array, start: jax.Array, module: native.LoraModule) -> jax.Array:
        w = np.zeros((16, 32), np.float32)
        w = w if linear is native.twin_linear else kernels.pack_linear(w)
        return linear(x, w, onto=jnp.asarray(y), adapters=native.LoraRows(twice, start, slots, ranks, (module,), MAX_RANK))

    slots = [[2, -1, 4, 0], [2, -1, 0, 4], [2, 2, 2, 2], [-1, -1, -1, -1], *([i % SLOTS, i % 3, 2, (i + 1) % SLOTS] for i in range(9))]
    starts = START, START + bank.shape[1]
    calls = [(jnp.int32(rows), RANKS - smaller, start, modules[0]._replace(column=column))
             for rows in slots for smaller in (0, 1) for start in starts for column in (2, 9)]  # fmt: skip
    for _ in range(2):
        for call in calls:
            np.testing.assert_allclose(step(kernels.linear, *call), step(native.twin_linear, *call), rtol=1e-4, atol=1e-3)


def test_slots_and_modules_outside_of_the_bank_are_refused(kernels: native.Kernels) -> None:
    bank, modules = bank_for(16, [16], "float32")
    y, x = normal(0, 1, 32), normal(1, 1, 16)
    for slot, module, ranks, message in [
        (SLOTS, modules[0], RANKS, "names slot 5 of 5"),
        (0, modules[0]._replace(b=bank.shape[1]), RANKS, "outside of the bank"),
        (0, modules[0]._replace(column=20), RANKS, "outside of the bank or of y"),
        (0, modules[0], RANKS + 16, "rank above"),
    ]:
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(lora(kernels, y, x, bank, jnp.int32([slot]), (module,), ranks))
    for start in (START + 1, -START):
        adapters = native.LoraRows(bank, start, jnp.int32([0]), RANKS, modules, MAX_RANK)
        with pytest.raises(Exception, match="outside of the bank"):
            jax.block_until_ready(kernels.linear(x, kernels.pack_linear(np.zeros((16, 32), np.float32)), onto=y, adapters=adapters))
    for slots, module, message in (([-1], modules[0]._replace(b=bank.shape[1]), "outside of the bank"), ([-1, -1], modules[0], "one number a row")):
        with pytest.raises(Exception, match=message):  # where no row has an adapter, too
            jax.block_until_ready(lora(kernels, y, x, bank, jnp.int32(slots), (module,)))
