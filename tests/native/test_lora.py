"""Low-rank updates by adapter: equal to the twin, bitwise the same beside any others, in place, within their bounds."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native
from jaxlora.lora_size import fill_up

from .arrays import ROUNDING, normal, same_bits

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
SLOTS, MAX_RANK = 5, 40
START = jnp.int32(7)  # what lies before it in a slot is not the adapter's
RANKS = jnp.int32([8, 0, 16, 24, 40])


def bank_for(k: int, widths: list[int], dtype: str, int8_step: float = 1 / 40) -> tuple[jax.Array, Modules]:
    """A bank that holds NaN wherever nobody may read, and modules side by side in y with a gap before the first."""
    modules, column, offset = [], 2, 0
    for width in widths:
        modules.append(native.LoraModule(offset, offset + k, column, width))
        offset += k + fill_up(width) + (4 if dtype == "int8" else 0)
        column += width
    bank = np.full((SLOTS, MAX_RANK * (int(START) + offset)), 99 if dtype == "int8" else np.nan, jnp.dtype(dtype))
    for slot, rank in enumerate(np.asarray(RANKS)):
        for at, module in enumerate(modules if rank else ()):
            a, b = (normal(10 * slot + at + begin, *shape) for begin, shape in ((100, (rank, k)), (200, (module.width, rank))))
            if dtype == "int8":
                a, b = (np.rint(values / int8_step).clip(-127, 127).astype(np.int8) for values in (a, b))
            a_at, b_at, end = (rank * (int(START) + offset) for offset in (module.a, module.b, module.b + fill_up(module.width)))
            bank[slot, a_at:end] = 0
            native.pack_lora(a, b, bank[slot, a_at:b_at], bank[slot, b_at:end])
            if dtype == "int8":
                scales = int8_step**2 * 2.0 ** np.random.default_rng(at).integers(-1, 2, rank)
                bank[slot, end : end + 4 * rank] = scales.astype(np.float32).view(np.int8)
    return jnp.asarray(bank), tuple(modules)


def round_values(bank: jax.Array) -> jax.Array:
    return bank if bank.dtype == jnp.int8 else jnp.round(bank)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "k, widths, rows",
    [
        (576, [576, 192, 192], [0]),
        (38, [11, 300], [2, -1, 2, 0, 1, 4, 3]),
        (8, [1], [-1, -1]),
        (64, [64], [4] * 20 + [2] * 3),
        (1100, [30], [2] * 50 + [4] * 83 + [3] * 2 + [0]),
    ],
)
def test_lora_equals_its_twin(kernels: native.Kernels, dtype: str, k: int, widths: list[int], rows: list[int]) -> None:
    bank, modules = bank_for(k, widths, dtype)
    y, x = normal(0, len(rows), sum(widths) + 3), normal(1, len(rows), k)
    rounded = dtype == "bfloat16" and kernels.isa in ROUNDING  # x, and what lies between A and B
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
@pytest.mark.parametrize("k", [100, 1100])
def test_a_row_of_lora_is_bitwise_the_same_beside_any_others(kernels: native.Kernels, dtype: str, k: int) -> None:
    bank, modules = bank_for(k, [70, 33], dtype)
    y, x = normal(0, 64, 106), normal(1, 64, k)
    slots = np.random.default_rng(5).integers(-1, SLOTS, 64).astype(np.int32)
    step = jax.jit(functools.partial(lora, kernels, modules=modules))
    alone = np.concatenate([step(y[i : i + 1], x[i : i + 1], bank, slots[i : i + 1]) for i in range(64)])
    for order in (np.arange(64), np.argsort(slots), np.random.default_rng(6).permutation(64)[:23]):
        assert same_bits(step(y[order], x[order], bank, slots[order]), alone[order])
    assert same_bits(alone[slots < 0], y[slots < 0])


def test_a_call_is_told_from_those_before_it_that_differ_in_one_thing(kernels: native.Kernels) -> None:
    module, later = native.LoraModule(0, 16, 2, 16), START + 32
    bank = jnp.asarray(normal(2, SLOTS, MAX_RANK * (int(later) + 32)))
    y, x = normal(0, 4, 32), normal(1, 4, 16)

    @functools.partial(jax.jit, static_argnames=("linear", "module"))
    def step(linear: Callable[..., jax.Array], slots: jax.Array, ranks: jax.Array, start: jax.Array, module: native.LoraModule) -> jax.Array:
        w = np.zeros((16, 32), np.float32)
        w = w if linear is native.twin_linear else kernels.pack_linear(w)
        return linear(x, w, onto=jnp.asarray(y), adapters=native.LoraRows(bank, start, slots, ranks, (module,), MAX_RANK))

    slots = [[2, -1, 4, 0], [2, -1, 0, 4], [2, 2, 2, 2], [-1, -1, -1, -1], *([i % SLOTS, i % 3, 2, (i + 1) % SLOTS] for i in range(9))]
    calls = [(jnp.int32(rows), RANKS - smaller, start, module._replace(column=column))
             for rows in slots for smaller in (0, 8) for start in (START, later) for column in (2, 9)]  # fmt: skip
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
        (0, modules[0], RANKS + 40, "rank above"),
        (0, modules[0], RANKS + 4, "no multiple of 8"),
    ]:
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(lora(kernels, y, x, bank, jnp.int32([slot]), (module,), ranks))
    for start in (START + 1, -START):
        adapters = native.LoraRows(bank, start, jnp.int32([0]), RANKS, modules, MAX_RANK)
        with pytest.raises(Exception, match="outside of the bank"):
            jax.block_until_ready(kernels.linear(x, kernels.pack_linear(np.zeros((16, 32), np.float32)), onto=y, adapters=adapters))
    adapters = native.LoraRows(bank.astype(jnp.bfloat16), START, jnp.int32([0]), RANKS, modules, MAX_RANK)
    with pytest.raises(Exception, match="even k"):
        jax.block_until_ready(kernels.linear(x[:, :15], kernels.pack_linear(np.zeros((15, 32), np.float32)), onto=y, adapters=adapters))
    with pytest.raises(Exception, match="multiples of 8"):
        jax.block_until_ready(kernels.linear(x, kernels.pack_linear(np.zeros((16, 32), np.float32)), onto=y, adapters=adapters._replace(max_rank=39)))
    for slots, module, message in (([-1], modules[0]._replace(b=bank.shape[1]), "outside of the bank"), ([-1, -1], modules[0], "one number a row")):
        with pytest.raises(Exception, match=message):  # where no row has an adapter, too
            jax.block_until_ready(lora(kernels, y, x, bank, jnp.int32(slots), (module,)))
