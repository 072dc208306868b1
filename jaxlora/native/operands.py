"""What products read besides rows: packed weights, and where the adapters of the rows lie."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.int8 import Int8
from jaxlora.int8_size import GROUP
from jaxlora.lora_size import fill_up
from jaxlora.native.compact import pack_compact

Array = jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["k", "n"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """Weights [k, n] as `linear` reads them, in panels of columns: float32 or float16 [panels, k, panel], pairs of bfloat16 as uint32
    [panels, pairs of k, panel], these in 12 bits each as uint16 (`pack_compact`), or bytes of scales and int8 as uint8
    [panels, groups of k, panel * (2 + GROUP)]."""

    data: Array
    k: int
    n: int


class LoraModule(NamedTuple):
    """One module that reads the x of a `linear` call. Offsets count from `start`, in values for each of an adapter's ranks: an adapter of fewer
    ranks takes less room. Its A and B lie there as `pack_lora` writes them."""

    a: int  # offset of A [k, rank]
    b: int  # offset of B [rank, width], with the adapter's scale folded in; in a bank of int8 float32 [rank] for both follow, as bytes
    column: int  # first column of y
    width: int  # columns of y


class LoraRows(NamedTuple):
    """The low-rank updates (x A) B that the rows of a `linear` call get, of all modules that read its x."""

    bank: Array  # float32, bfloat16 or int8 [slots, size]
    start: Array  # int32 scalar, from which the modules count, as they do
    row_slot: Array  # int32 [m], each row's slot of the bank, or -1 for none
    rank: Array  # int32 [slots], multiples of LORA_UNIT, at most `max_rank`
    modules: tuple[LoraModule, ...]  # where their A and B lie, and which columns of y are theirs
    max_rank: int  # for which a slot has room


LORA_PANEL = 16


def lora_depth(dtype: jnp.dtype) -> int:
    """How many values of k lie side by side in an A or B of that type."""
    return 2 if dtype == jnp.bfloat16 else 1


def pack_lora(a: np.ndarray, b: np.ndarray, a_room: np.ndarray, b_room: np.ndarray) -> None:
    """Writes A and B of a module into their rooms in an adapter's part of a bank.

    Each is a [k, n] that is read one panel of columns after the other, [panels, k, LORA_PANEL]; the last panel may have LORA_UNIT columns.
    In bfloat16 pairs of k lie side by side, [panels, pairs of k, LORA_PANEL, 2].

    Arguments:
        a: [r, in], as it lies in a file, r being at most the ranks that there is room for.
        b: [out, r].
        a_room: [ranks * in] zeros, of the bank's type.
        b_room: [ranks * out] zeros, `out` filled up to a multiple of LORA_UNIT.
    """
    _write_panels(a, a_room, a.shape[1])
    _write_panels(b, b_room, b_room.size // fill_up(len(b)))


def _write_panels(w: np.ndarray, room: np.ndarray, k: int) -> None:
    """For the transpose of w, filled up with zeros where there is room for more."""
    n = room.size // k
    if w.shape != (n, k):
        w = np.pad(w, ((0, n - w.shape[0]), (0, k - w.shape[1])))
    w = np.ascontiguousarray(w, room.dtype)
    if lora_depth(room.dtype) == 2:
        w, room, k = w.view(np.uint32), room.view(np.uint32), k // 2
    whole = n // LORA_PANEL * LORA_PANEL
    room[: whole * k].reshape(-1, k, LORA_PANEL)[:] = w[:whole].reshape(-1, LORA_PANEL, k).swapaxes(1, 2)
    room[whole * k :].reshape(k, n - whole)[:] = w[whole:].T


def pack_linear(w: np.ndarray | Array | Int8, panel: int, halves: bool = False, compact: bool = False, transposed: bool = False) -> Packed:
    """Packs float32, bfloat16 or int8 weights [k, n], once. Needs their size in memory besides.

    Arguments:
        panel: columns of a panel, `Kernels.panel`.
        halves: bfloat16 weights become float16, unless some are so large that sums might leave its range.
        compact: bfloat16 weights take 12 bits each, unless too many have no such code.
        transposed: an array is [n, k], as weights lie in checkpoints.

    Raises:
        TypeError: another type or number of dimensions.
    """
    if isinstance(w, Int8):
        return Packed(_pack_int8(w, panel), *w.shape)
    if w.ndim != 2 or w.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"weights are float32 or bfloat16 [k, n], not {w.dtype} {list(w.shape)}")
    k, n = w.shape[::-1] if transposed else w.shape
    halves = halves and w.dtype == jnp.bfloat16 and _fits_halves(w)
    data = _pack(w, panel, jnp.float16 if halves else w.dtype, transposed)
    if compact and data.dtype == jnp.uint32:
        data = data if (codes := pack_compact(data, k)) is None else codes
    return Packed(data, k, n)


# Compiled, they are one pass over the weights, however these lie in memory.
@functools.partial(jax.jit, static_argnames=("panel", "dtype", "transposed"))
def _pack(w: Array, panel: int, dtype: jnp.dtype, transposed: bool) -> Array:
    w = (w.T if transposed else w).astype(dtype)
    if dtype != jnp.bfloat16:
        return _panels(w, panel)
    pairs = jnp.pad(w, ((0, w.shape[0] % 2), (0, 0))).reshape(-1, 2, w.shape[1]).swapaxes(1, 2)
    return _panels(jax.lax.bitcast_convert_type(pairs, jnp.uint32), panel)


@functools.partial(jax.jit, static_argnames="panel")
def _pack_int8(w: Int8, panel: int) -> Array:
    k, n = w.shape
    # Without a sign, for an instruction that wants one factor so.
    values = (w.values.astype(jnp.int32) + 128).astype(jnp.uint8)
    values = jnp.pad(values, ((0, -k % GROUP), (0, -n % panel)), constant_values=128)
    quads = values.reshape(-1, GROUP // 4, 4, values.shape[1] // panel, panel).transpose(3, 0, 1, 4, 2)
    scales = jax.lax.bitcast_convert_type(_panels(w.scales, panel), jnp.uint8)
    parts = (part.reshape(*scales.shape[:2], -1) for part in (scales, quads))
    return jnp.concatenate(list(parts), axis=-1)


def _panels(w: Array, panel: int) -> Array:
    """[panels, k, panel], from weights [k, n]; what the last panel has more is 0."""
    w = jnp.pad(w, ((0, 0), (0, -w.shape[1] % panel)))
    return w.reshape(w.shape[0], -1, panel).swapaxes(0, 1)


def _fits_halves(w: Array) -> bool:
    # A sum has 32 products with values of x below 2.
    return bool(jnp.max(jnp.abs(w), initial=0) < 1000)  # not if one is NaN
