"""An adapter placed in the bank piece by piece."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native
from jaxlora.config import ModelConfig
from jaxlora.lora import BankLayout, write_ranks
from jaxlora.lora_size import fill_up
from jaxlora.peft import LoraPair
from tests.training.tiny import CONFIG

from .arrays import normal

LAYOUTS = {dtype: BankLayout.of(ModelConfig.from_dict(CONFIG), 20, dtype) for dtype in ("float32", "bfloat16", "int8")}
LAYOUT = LAYOUTS["float32"]


def adapter(rank: int) -> dict[str, LoraPair]:
    """Without every third module, and with a lower rank in some."""
    pairs = {}
    for at, (path, span) in enumerate(LAYOUT.spans):
        if at % 3:
            own = max(1, rank - at % 2)
            pairs[path] = LoraPair(normal(at, own, span.in_features), normal(at + 50, span.out_features, own), 0.5)
    return pairs


@functools.partial(jax.jit, donate_argnums=0)
def place(bank: jax.Array, piece: jax.Array, slot: int, number: int) -> jax.Array:
    return native.Kernels.place(bank, piece, *map(jnp.int32, (slot, number)))


def test_a_slot_has_room_for_whole_units() -> None:
    assert {(layout.max_rank, layout.size) for layout in LAYOUTS.values() if layout.dtype != "int8"} == {(24, 24 * LAYOUT.of_rank)}


@pytest.mark.parametrize("dtype", LAYOUTS)
@pytest.mark.parametrize("ranks, piece", [(8, 100), (16, 1000), (24, LAYOUT.size), (16, 10 * LAYOUT.size)])
def test_an_adapter_comes_to_its_place_and_nothing_else_changes(kernels: native.Kernels, ranks: int, piece: int, dtype: str) -> None:
    layout = LAYOUTS[dtype]
    before = (normal(1, 3, layout.size) * 30).astype(layout.dtype)
    vector = layout.pack(adapter(ranks - 3), ranks, piece, native.pack_lora)
    assert len(vector) % piece == 0
    bank = jnp.array(before)
    for number, part in enumerate(vector.reshape(-1, piece)):
        bank = place(bank, part, 1, number)
    want = before.copy()
    want[1, : len(vector)] = vector[: layout.size]
    assert np.asarray(bank).tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", LAYOUTS)
@pytest.mark.parametrize("rank, ranks", [(5, 8), (13, 16), (20, 24)])
def test_the_forms_of_an_adapter_hold_the_same_values(rank: int, ranks: int, dtype: str) -> None:
    layout, modules = LAYOUTS[dtype], adapter(rank)
    plain, panels = (layout.pack(modules, ranks, 1, write) for write in (write_ranks, native.pack_lora))
    depth = 2 if dtype == "bfloat16" else 1

    def read(begin: int, k: int, columns: int) -> np.ndarray:
        """[k, columns] from panels."""
        values, found = panels[ranks * begin :], np.zeros((k, columns), layout.dtype)
        for first in range(0, columns, 16):
            width = min(16, fill_up(columns) - first)
            panel = values[first * k :][: width * k].reshape(k // depth, width, depth).swapaxes(1, 2).reshape(k, width)
            found[:, first : first + width] = panel[:, : columns - first]
        return found

    for _, span in layout.spans:
        a = plain[ranks * span.a_offset :][: ranks * span.in_features].reshape(ranks, -1)
        b = plain[ranks * span.b_offset :][: ranks * span.out_features].reshape(ranks, -1)
        np.testing.assert_array_equal(read(span.a_offset, span.in_features, ranks), a.T)
        np.testing.assert_array_equal(read(span.b_offset, ranks, span.out_features), b)
        scales = slice(ranks * span.scales_offset, ranks * (span.scales_offset + 4 * (dtype == "int8")))
        assert plain[scales].tobytes() == panels[scales].tobytes()


@pytest.mark.parametrize("slot, number", [(3, 0), (-1, 0), (0, -1), (0, LAYOUT.size // 10 + 1)])
def test_what_lies_outside_is_refused(kernels: native.Kernels, slot: int, number: int) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="outside of the bank"):
        place(jnp.zeros((3, LAYOUT.size)), jnp.zeros(10), slot, number).block_until_ready()


def test_a_module_of_a_higher_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="has rank 9, there is room for 8"):
        LAYOUT.pack(adapter(10), 8, 1)
