"""The mathematics of LoRA (Hu et al. 2021, `y = Wx + s B A x`) and the bank of adapters on the device.

Knows arrays and module paths; knows no file format and no adapter names.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxlora.config import OUTPUT_LAYER, LinearAt, ModelConfig
from jaxlora.int8 import quantize_ranks
from jaxlora.int8_size import SCALE_BYTES
from jaxlora.lora_size import fill_up
from jaxlora.updates import update_slice


class Pair(Protocol):
    """One module of an adapter: `a` is `[r, in]`, `b` is `[out, r]`, `scale` is alpha / r or alpha / sqrt(r)."""

    a: np.ndarray
    b: np.ndarray
    scale: float


@struct.dataclass
class Adapter:
    """One adapter for all rows, as training has it: arrays by module path, `a [r, in]` and `b [out, r]`, scales static. Implements
    `jaxlora.model.Adapters`, and `LayerAdapters` where it is the part of one layer, by names."""

    a: dict[str, Array]
    b: dict[str, Array]
    scales: tuple[tuple[str, float], ...] = struct.field(pytree_node=False)

    @classmethod
    def from_pairs(cls, modules: Mapping[str, Pair], dtype: str = "float32") -> "Adapter":
        """From the modules of an adapter that was read from disk."""
        return cls(
            a={path: jnp.asarray(pair.a, dtype) for path, pair in modules.items()},
            b={path: jnp.asarray(pair.b, dtype) for path, pair in modules.items()},
            scales=tuple((path, float(pair.scale)) for path, pair in sorted(modules.items())),
        )

    def of_layer(self, config: ModelConfig, layer: int | None) -> "Adapter":
        """The modules of one layer by their names (`q_proj`), None being the output layer."""
        paths = {name: config.module_path(layer, name) for name in config.names(layer)}
        paths = {name: path for name, path in paths.items() if path in self.a}
        scales = dict(self.scales)
        return Adapter(
            a={name: self.a[path] for name, path in paths.items()},
            b={name: self.b[path] for name, path in paths.items()},
            scales=tuple((name, scales[path]) for name, path in paths.items()),
        )

    def __call__(self, name: str, x: Array, y: Array) -> Array:
        """`y + s B A x` where the adapter has that module, else `y`."""
        if name not in self.a:
            return y
        # As matrices: the gradients of products with more dimensions take XLA more than twice as long on CPUs.
        down = jnp.einsum("mk,rk->mr", x.reshape(-1, x.shape[-1]), self.a[name], precision="highest")
        up = jnp.einsum("mr,nr->mn", down, self.b[name], precision="highest")
        return y + (dict(self.scales)[name] * up).astype(y.dtype).reshape(y.shape)


@dataclasses.dataclass(frozen=True)
class Span:
    """Where one module lies in a bank slot, in values for each of an adapter's ranks: A [in] from `a_offset` on, scale-folded B [out] from
    `b_offset` on. In a bank of int8 the bytes of a float32 follow at `scales_offset`: by how much a rank of A times that of B is to be
    multiplied."""

    a_offset: int
    b_offset: int
    scales_offset: int
    in_features: int
    out_features: int


# Writes A [r, in] and B [out, r] of a module into their rooms, [ranks * in] and [ranks * out filled up to LORA_UNIT] zeros.
Write = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


def write_ranks(a: np.ndarray, b: np.ndarray, a_room: np.ndarray, b_room: np.ndarray) -> None:
    """One rank after the other, as `RowAdapters` reads them."""
    (rank, k), n = a.shape, len(b)
    a_room[: rank * k].reshape(rank, k)[:] = a
    b_room[: rank * n].reshape(rank, n)[:] = b.T


@dataclasses.dataclass(frozen=True)
class BankLayout:
    """One adapter as one flat vector: loading one is a single copy, and its memory is one number. It takes as much of a slot as it has ranks.
    Layers lie one behind the other and look the same inside, the output layer is the last."""

    max_rank: int
    """Of the adapters that a slot has room for, a multiple of LORA_UNIT."""
    dtype: np.dtype
    """float32, bfloat16 or int8."""
    spans: tuple[tuple[str, Span], ...]
    """By module path."""
    inside: tuple[tuple[str, Span], ...]
    """By the name of a linear layer, with offsets from where its decoder layer (or the output layer) begins."""
    starts: tuple[tuple[int | None, int], ...]
    """Where each layer begins, None being the output layer."""
    of_rank: int
    """Values that a rank takes."""

    @classmethod
    def of(cls, config: ModelConfig, max_rank: int, dtype: str, output_layer: bool = False) -> "BankLayout":
        """The layout for every linear layer of a model; the output layer takes part only where asked, as it is large."""
        kind = jnp.dtype(dtype)
        spans: dict[str, Span] = {}
        inside: dict[str, Span] = {}
        starts: dict[int | None, int] = {}
        offset = 0
        for path, at in config.linear_paths().items():
            if path == OUTPUT_LAYER and not output_layer:
                continue
            start = starts.setdefault(at.layer, offset)
            inside.setdefault(at.name, _span(at, offset - start))
            spans[path] = _span(at, offset)
            offset = spans[path].scales_offset + (SCALE_BYTES if kind == np.int8 else 0)
        return cls(fill_up(max_rank), kind, tuple(spans.items()), tuple(inside.items()), tuple(starts.items()), offset)

    @property
    def size(self) -> int:
        """Values of a slot."""
        return self.max_rank * self.of_rank

    @functools.cached_property
    def by_path(self) -> dict[str, Span]:
        return dict(self.spans)

    @functools.cached_property
    def by_name(self) -> dict[str, Span]:
        return dict(self.inside)

    def start(self, layer: int | None) -> np.int32:
        """Where the layer begins, in values for each rank; the end, if it has no place in the bank."""
        return np.int32(dict(self.starts).get(layer, self.of_rank))

    def pack(self, modules: Mapping[str, Pair], ranks: int, piece: int, write: Write = write_ranks) -> np.ndarray:
        """An adapter for so many ranks, a multiple of LORA_UNIT, `[n]`; what it doesn't have is zero, and so is the end, up to whole pieces.

        Raises:
            ValueError: a module has a higher rank.
        """
        out = np.zeros(-(-self.of_rank * ranks // piece) * piece, self.dtype)
        for path, pair in modules.items():
            span, rank = self.by_path[path], pair.a.shape[0]
            if rank > ranks:
                raise ValueError(f"{path} has rank {rank}, there is room for {ranks}")
            a, b = pair.a, pair.b if pair.scale == 1 else pair.b.astype(np.float32) * np.float32(pair.scale)
            if self.dtype == np.int8:
                a, ranks_of_b, scales = quantize_ranks(a, b.T)
                b = ranks_of_b.T
                out[ranks * span.scales_offset :][: scales.size] = scales.ravel()
            write(a, b, out[ranks * span.a_offset : ranks * span.b_offset], out[ranks * span.b_offset : ranks * span.scales_offset])
        return out


def _span(at: LinearAt, offset: int) -> Span:
    b_offset = offset + at.in_features
    return Span(offset, b_offset, b_offset + fill_up(at.out_features), at.in_features, at.out_features)


@struct.dataclass
class Bank:
    """The adapters on the device: `data` is `[slots, layout.size]`, `ranks` int32 `[slots]` says for how many ranks a slot is packed."""

    data: Array
    ranks: Array

    @classmethod
    def empty(cls, layout: BankLayout, slots: int) -> "Bank":
        return cls(jnp.zeros((slots, layout.size), layout.dtype), jnp.zeros(slots, jnp.int32))


def put(bank: Bank, vector: Array, slot: Array, rank: Array) -> Bank:
    """The bank with one slot replaced, in place if donated. `vector` is `[layout.size]`, of the bank's type."""
    return Bank(update_slice(bank.data, vector[None], (slot, 0)), bank.ranks.at[slot].set(rank))


@struct.dataclass
class RowAdapters:
    """Applies to row b of a batch the adapter in bank slot `slots[b]` (int32 `[B]`; -1: the base model). Implements
    `jaxlora.model.Adapters`, and `LayerAdapters` for the layer that begins at `start`.

    Every row computes with its own adapter only, at the bank's full rank, so a row's result depends neither on the others nor on where
    its adapter lies. The gather reads whole adapters at every step: right for accelerators, slow on CPUs, where `jaxlora.native` has a
    kernel that reads true ranks once.
    """

    layout: BankLayout = struct.field(pytree_node=False)
    bank: Bank
    slots: Array
    start: Array | np.int32 = np.int32(0)

    def of_layer(self, config: ModelConfig, layer: int | None) -> "RowAdapters":
        return self.replace(start=self.layout.start(layer))

    def __call__(self, name: str, x: Array, y: Array) -> Array:
        span = self.layout.by_name.get(name)
        if span is None:
            return y
        a, b = self._rows(span.a_offset, span.in_features), self._rows(span.b_offset, span.out_features)
        x = x.reshape(self.slots.shape[0], -1, x.shape[-1])
        down = jnp.einsum("btk,brk->btr", x, a.astype(x.dtype), precision="highest")
        if self.layout.dtype == jnp.int8:
            scales = self._rows(span.scales_offset, SCALE_BYTES)
            down *= jax.lax.bitcast_convert_type(scales, jnp.float32)[:, None].astype(x.dtype)
        up = jnp.einsum("btr,brn->btn", down, b.astype(x.dtype), precision="highest")
        return jnp.where((self.slots >= 0).reshape(-1, *[1] * (y.ndim - 1)), y + up.reshape(y.shape), y)

    def _rows(self, offset: int, width: int) -> Array:
        """`[B, max_rank, width]` from there in every row's slot. One gather: a slice of the bank would be a copy on CPUs."""
        ranks = self.layout.max_rank

        def row(slot: Array) -> Array:
            begin = ranks * (self.start + offset)
            return jax.lax.dynamic_slice(self.bank.data, (slot, begin), (1, ranks * width)).reshape(ranks, width)

        return jax.vmap(row)(jnp.maximum(self.slots, 0))
