"""What products read besides rows: packed weights, and where the adapters of the rows lie."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.int8 import Int8
from jaxlora.int8_size import GROUP

Array = jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["k", "n"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """Weights [k, n] as `linear` reads them, in panels of columns: float32 or float16 [panels, k, panel], pairs of bfloat16 as uint32
    [panels, pairs of k, panel], or bytes of scales and int8 as uint8 [panels, groups of k, panel * (2 + GROUP)]."""

    data: Array
    k: int
    n: int


class LoraModule(NamedTuple):
    """One module that reads the x of a `linear` call. Offsets count values from `start` in a slot's part of the bank."""

    a: int  # offset of A [max_rank, k], of which the first rows up to the slot's rank are read
    b: int  # offset of B [max_rank, width], with the adapter's scale folded in; in a bank of int8 float32 [max_rank] for both follow, as bytes
    column: int  # first column of y
    width: int  # columns of y


class LoraRows(NamedTuple):
    """The low-rank updates (x A^T) B that the rows of a `linear` call get, of all modules that read its x."""

    bank: Array  # float32, bfloat16 or int8 [slots, size]
    start: Array  # int32 scalar, where the part of a slot begins from which the modules count
    row_slot: Array  # int32 [m], each row's slot of the bank, or -1 for none
    rank: Array  # int32 [slots], true ranks, at most `max_rank`
    modules: tuple[LoraModule, ...]  # where their A and B lie, and which columns of y are theirs
    max_rank: int  # rows of every A and B in the bank


def pack_linear(w: np.ndarray | Array | Int8, panel: int, halves: bool = False, transposed: bool = False) -> Packed:
    """Packs float32, bfloat16 or int8 weights [k, n], once. Needs their size in memory besides.

    Arguments:
        panel: columns of a panel, `Kernels.panel`.
        halves: bfloat16 weights become float16, unless some are so large that sums might leave its range.
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
    return Packed(_pack(w, panel, jnp.float16 if halves else w.dtype, transposed), k, n)


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
