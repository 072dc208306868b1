"""An adapter placed in the bank piece by piece."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native
from jaxlora.config import ModelConfig
from jaxlora.lora import BankLayout
from jaxlora.peft import LoraPair
from tests.training.tiny import CONFIG

from .arrays import normal

LAYOUTS = {dtype: BankLayout.of(ModelConfig.from_dict(CONFIG), 6, dtype) for dtype in ("float32", "bfloat16", "int8")}
LAYOUT = LAYOUTS["float32"]


def adapter(rank: int) -> dict[str, LoraPair]:
    """Without every third module, and with a lower rank in some."""
    pairs = {}
    for at, (path, span) in enumerate(LAYOUT.spans):
        if at % 3:
            own = max(1, rank - at % 2)
            pairs[path] = LoraPair(normal(at, own, span.in_features), normal(at + 50, span.out_features, own), 0.5)
    return pairs


@functools.partial(jax.jit, donate_argnums=0, static_argnames="layout")
def place(bank: jax.Array, piece: jax.Array, slot: int, rank: int, first: int, layout: BankLayout = LAYOUT) -> jax.Array:
    return native.Kernels.place(bank, piece, *map(jnp.int32, (slot, rank, first)), offsets=layout.offsets, max_rank=layout.max_rank)


@pytest.mark.parametrize("dtype", LAYOUTS)
@pytest.mark.parametrize("rank, piece", [(1, 100), (3, 1000), (6, LAYOUT.size), (5, 10 * LAYOUT.size)])
def test_the_ranks_of_an_adapter_come_to_their_places_and_nothing_else_changes(
    kernels: native.Kernels, rank: int, piece: int, dtype: str
) -> None:
    modules, layout = adapter(rank), LAYOUTS[dtype]
    before = (normal(1, 3, layout.size) * 30).astype(layout.dtype)
    vector = layout.pack(modules, rank, piece)
    assert len(vector) % piece == 0
    bank = jnp.array(before)
    for first in range(0, len(vector), piece):
        bank = place(bank, vector[first : first + piece], 1, rank, first, layout)
    want, whole = before.copy(), layout.pack(modules, layout.max_rank, layout.size)
    for _, span in layout.spans:
        parts = [(span.a_offset, span.in_features), (span.b_offset, span.out_features), (span.scales_offset, 4 * (dtype == "int8"))]
        for offset, width in parts:
            want[1, offset : offset + rank * width] = whole[offset : offset + rank * width]
    assert np.asarray(bank).tobytes() == want.tobytes()


@pytest.mark.parametrize("slot, rank, first", [(3, 1, 0), (-1, 1, 0), (0, 7, 0), (0, -1, 0), (0, 1, -5)])
def test_what_lies_outside_is_refused(kernels: native.Kernels, slot: int, rank: int, first: int) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="outside of the bank"):
        place(jnp.zeros((3, LAYOUT.size)), jnp.zeros(10), slot, rank, first).block_until_ready()


def test_a_module_of_a_higher_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="has rank 5, there is room for 4"):
        LAYOUT.pack(adapter(6), 4, 1)
