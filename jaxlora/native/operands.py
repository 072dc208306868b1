"""What products read besides rows: packed weights, and where the adapters of the rows lie."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
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


def pack_linear(w: np.ndarray | Array | Int8, panel: int, halves: bool = False) -> Packed:
    """Packs float32, bfloat16 or int8 weights [k, n], once. Needs their size in host memory besides.

    Arguments:
        panel: columns of a panel, `Kernels.panel`.
        halves: bfloat16 weights become float16, unless some are so large that sums might leave its range.

    Raises:
        TypeError: another type or number of dimensions.
    """
    if isinstance(w, Int8):
        return _pack_int8(w, panel)
    w = np.asarray(w)
    if w.ndim != 2 or w.dtype not in (np.float32, ml_dtypes.bfloat16):
        raise TypeError(f"weights are float32 or bfloat16 [k, n], not {w.dtype} {list(w.shape)}")
    k, n = w.shape
    panels = -(-n // panel)
    if w.dtype == np.float32:
        data = np.zeros((k, panels * panel), np.float32)
    elif halves and _fits_halves(w):
        data = np.zeros((k, panels * panel), np.float16)
    else:
        pairs = np.zeros((-(-k // 2) * 2, panels * panel), np.uint16)
        pairs[:k, :n] = w.view(np.uint16)
        pairs = pairs.reshape(-1, 2, panels, panel).transpose(2, 0, 3, 1)
        return Packed(jnp.asarray(np.ascontiguousarray(pairs).view(np.uint32)[..., 0]), k, n)
    data[:, :n] = w
    return Packed(jnp.asarray(np.ascontiguousarray(data.reshape(k, panels, panel).transpose(1, 0, 2))), k, n)


def _pack_int8(w: Int8, panel: int) -> Packed:
    k, n = w.shape
    groups, panels = -(-k // GROUP), -(-n // panel)
    # Without a sign, for an instruction that wants one factor so.
    values = np.full((groups * GROUP, panels * panel), 128, np.uint8)
    values[:k, :n] = np.asarray(w.values).view(np.uint8) + np.uint8(128)
    scales = np.zeros((groups, panels * panel), np.uint16)
    scales[:, :n] = np.asarray(w.scales).view(np.uint16)
    data = np.empty((panels, groups, panel * (2 + GROUP)), np.uint8)
    data[..., : panel * 2] = np.ascontiguousarray(scales.reshape(groups, panels, panel).transpose(1, 0, 2)).view(np.uint8)
    quads = values.reshape(groups, GROUP // 4, 4, panels, panel).transpose(3, 0, 1, 4, 2)
    data[..., panel * 2 :] = quads.reshape(panels, groups, panel * GROUP)
    return Packed(jnp.asarray(data), k, n)


def _fits_halves(w: np.ndarray) -> bool:
    # A sum has 32 products with values of x below 2. The bits of bfloat16 without the sign are in the order of the sizes, NaN last.
    limit = int(np.asarray(1000, ml_dtypes.bfloat16).view(np.uint16))
    return not w.size or int((w.view(np.uint16) & 0x7FFF).max()) < limit
