"""How a step computes its products, its attention and its adapters: plain XLA everywhere, hand-written kernels on CPUs.

Both give the same answers within rounding, and each gives a row the same bits in any batch. Knows no requests and no adapter names.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxlora import kv_cache, lora, native
from jaxlora.config import OUTPUT_LAYER, ModelConfig
from jaxlora.int8 import Int8
from jaxlora.kv_cache import Rows
from jaxlora.lora import Bank, BankLayout, RowAdapters
from jaxlora.lora_size import fill_up
from jaxlora.model import GATE_UP, QKV, Attend, Elements, Gated, Input, Linears, Normed, PlainElements, PlainLinears, heads
from jaxlora.weights import Layer, Packing, PlainPacking


class Backend(Elements, Protocol):
    """The parts of a step that differ between machines."""

    packing: Packing
    name: str
    dtype: str
    """The type of weights and cache that is fastest here."""
    cut_invariant: bool
    """Whether keys and values come out the same bit for bit however a sequence is cut into steps."""
    mixes: bool
    """Whether the rows of a step may have any number of tokens each: parts of prompts beside single tokens of answers."""
    write_adapter: lora.Write
    """How A and B of a module come to lie in the bank."""

    def batch_sizes(self, slots: int) -> tuple[int, ...]:
        """The numbers of rows that a decode step may have, ascending; the last is `slots`."""

    def bank_ranks(self, layout: BankLayout, rank: int) -> int:
        """How many ranks an adapter of that rank has to fill in the bank."""

    def piece(self, layout: BankLayout) -> int:
        """Values of an adapter that `place` takes at a time."""

    def place(self, bank: Bank, piece: Array, slot: Array, ranks: Array, number: Array) -> Bank:
        """The bank with a piece of an adapter, packed for so many ranks, in a slot: behind `number` others of its size."""

    def linears(self, config: ModelConfig, layout: BankLayout, bank: Bank, row_slots: Array, rows: Rows) -> Linears:
        """The model's linear layers with the adapter of bank slot `row_slots[b]` (int32 `[B]`, -1: none) applied to row b."""

    def argmax_logsumexp(self, logits: Array) -> tuple[Array, Array]:
        """The first largest of each row of `[B, V]`, and the logarithm of its summed exponentials."""

    def draw(
        self, logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, keys: Array, positions: Array
    ) -> Array:
        """A token, int32 `[B]`, for each row of `logits [B, V]` with a temperature above 0: see `native.Kernels.draw`."""

    def attend(self, config: ModelConfig, rotation: tuple[Array, Array], rows: Rows) -> Attend:
        """Attention of a step: stores new keys and values in a layer's caches, a pair of `[S, K, L, C]`, and attends over them.

        Arguments:
            rotation: cosines and sines of every position, `[positions, C / 2]`.
        """


@dataclasses.dataclass(frozen=True)
class XlaBackend(PlainElements):
    """Plain JAX. One batch size, since XLA may add up in another order for another shape."""

    packing = PlainPacking()
    name = "xla"
    cut_invariant = mixes = False
    draw = staticmethod(native.twin_draw)
    write_adapter = staticmethod(lora.write_ranks)

    @property
    def dtype(self) -> str:
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"

    def batch_sizes(self, slots: int) -> tuple[int, ...]:
        return (slots,)

    def bank_ranks(self, layout: BankLayout, rank: int) -> int:
        return layout.max_rank  # rows compute with all of them

    def piece(self, layout: BankLayout) -> int:
        return layout.size

    def place(self, bank: Bank, piece: Array, slot: Array, ranks: Array, number: Array) -> Bank:
        return lora.put(bank, piece, slot, ranks)

    def linears(self, config: ModelConfig, layout: BankLayout, bank: Bank, row_slots: Array, rows: Rows) -> Linears:
        return PlainLinears(config, RowAdapters(layout, bank, row_slots))

    def argmax_logsumexp(self, logits: Array) -> tuple[Array, Array]:
        return native.twin_argmax_logsumexp(logits)

    def attend(self, config: ModelConfig, rotation: tuple[Array, Array], rows: Rows) -> Attend:
        def attend(layer: Layer, caches: tuple[Array, Array], qkv: tuple[Array, ...], window: int) -> tuple[Array, tuple[Array, Array]]:
            positions = rows.positions(qkv[0].shape[1])
            turned = tuple(jnp.take(table, positions, axis=0, mode="clip")[:, :, None] for table in rotation)
            q, k, v = heads(config, layer, qkv, turned)
            k_cache, v_cache = kv_cache.write(caches[0], k, rows), kv_cache.write(caches[1], v, rows)
            return kv_cache.attend(q, k_cache, v_cache, rows, window).reshape(*q.shape[:2], -1), (k_cache, v_cache)

        return attend


@struct.dataclass
class PackedDense:
    """Linear layers that share their input, packed side by side; `bias` is float32 `[out]` or None."""

    packed: native.Packed
    bias: Array | None

    def __call__(self, x: Array, **around: Any) -> Array:
        """float32 `[..., in] -> [..., out]`, with what `native.Kernels.linear` does before and after it."""
        y = native.Kernels.linear(x, self.packed, **around)
        return y if self.bias is None else y + self.bias


@dataclasses.dataclass(frozen=True)
class NativeLinears:
    """Implements `jaxlora.model.Linears`: one call for a group, with the adapters of all its modules; results side by side."""

    layout: BankLayout
    bank: Bank
    row_slots: Array
    rows: Rows
    live: tuple[Array, Array]
    """`Rows.live` of them."""

    def own(self, layer: int | None) -> np.int32:
        return self.layout.start(layer)

    def __call__(
        self, dense: Mapping[str, PackedDense], own: Array, names: tuple[str, ...], x: Input, onto: Array | None = None
    ) -> tuple[Array, ...]:
        around: dict[str, Any] = {"onto": onto}
        match x:
            case Normed(x, scale, eps):
                around["norm"] = scale, eps
            case Gated((x,)):
                around["gated"] = True
        one_each = x.shape[:2] == (len(self.row_slots), 1)
        # What follows on the output layer is plain JAX, which computes with all rows.
        around |= {"live": self.live[0 if one_each else 1], "cleared": names == (OUTPUT_LAYER,)}
        spans = [self.layout.by_name.get(name) for name in names]
        if None not in spans:  # the bank need not have adapters of the output layer
            ends = np.cumsum([span.out_features for span in spans]).tolist()
            modules = tuple(
                native.LoraModule(span.a_offset, span.b_offset, end - span.out_features, span.out_features) for span, end in zip(spans, ends)
            )
            slots = self.row_slots if one_each else self.rows.of_tokens(self.row_slots, x.shape[0] * x.shape[1])
            around["adapters"] = native.LoraRows(self.bank.data, own, slots, self.bank.ranks, modules, self.layout.max_rank)
        return (dense["+".join(names)](x, **around),)


@dataclasses.dataclass(frozen=True)
class NativePacking:
    """What the kernels read: query, key and value in one product, gate and up in another; activations are float32."""

    kernels: native.Kernels
    groups = (QKV, ("o_proj",), GATE_UP, ("down_proj",))

    def dense(self, kernels: list[Array] | list[Int8], biases: list[Array | None]) -> PackedDense:
        axis = 1 if isinstance(kernels[0], Int8) else 0  # that of the outputs
        bias = None
        if any(bias is not None for bias in biases):
            parts = [jnp.zeros(kernel.shape[axis]) if b is None else b.astype(jnp.float32) for kernel, b in zip(kernels, biases)]
            bias = jnp.concatenate(parts)
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis), *kernels) if len(kernels) > 1 else kernels[0]
        return PackedDense(self.kernels.pack_linear(joined, transposed=True), bias)

    def activations(self, dtype: jnp.dtype) -> jnp.dtype:
        return jnp.dtype(jnp.float32)


PIECE = 1 << 20  # values


@dataclasses.dataclass(frozen=True)
class NativeBackend:
    """`jaxlora.native` on CPUs. Its kernels give a row the same bits whatever the number of rows, so batches may be of any size. Products leave
    out the rows that fill one up, so that few sizes do: each has to be compiled."""

    kernels: native.Kernels
    dtype = "bfloat16"
    cut_invariant = mixes = True
    draw = staticmethod(native.Kernels.draw)
    write_adapter = staticmethod(native.pack_lora)

    @property
    def packing(self) -> NativePacking:
        return NativePacking(self.kernels)

    @property
    def name(self) -> str:
        return f"native {self.kernels.isa}"

    def batch_sizes(self, slots: int) -> tuple[int, ...]:
        sizes, size = [1], 2
        while 2 * size <= slots:
            sizes.append(size)
            size *= 4
        return (*sizes, slots) if slots > 1 else (1,)

    def bank_ranks(self, layout: BankLayout, rank: int) -> int:
        return min(fill_up(rank), layout.max_rank)  # the kernel reads no others

    def piece(self, layout: BankLayout) -> int:
        return min(PIECE, layout.size)

    def place(self, bank: Bank, piece: Array, slot: Array, ranks: Array, number: Array) -> Bank:
        return Bank(native.Kernels.place(bank.data, piece, slot, number), bank.ranks.at[slot].set(ranks))

    def linears(self, config: ModelConfig, layout: BankLayout, bank: Bank, row_slots: Array, rows: Rows) -> Linears:
        return NativeLinears(layout, bank, row_slots, rows, rows.live())

    def embed(self, table: Array, tokens: Array, dtype: jnp.dtype) -> Array:
        return native.Kernels.embed(table, tokens)

    def rms_norm(self, x: Array, scale: Array, eps: float) -> Array:
        return native.Kernels.rms_norm(x, scale, eps)

    def argmax_logsumexp(self, logits: Array) -> tuple[Array, Array]:
        return native.Kernels.argmax_logsumexp(logits)

    def attend(self, config: ModelConfig, rotation: tuple[Array, Array], rows: Rows) -> Attend:
        options = dict(scale=config.head_dim**-0.5, eps=config.rms_norm_eps)

        def attend(layer: Layer, caches: tuple[Array, Array], qkv: tuple[Array], window: int) -> tuple[Array, tuple[Array, Array]]:
            norms = (layer.q_norm, layer.k_norm) if config.qk_norm else None
            where = rows.starts, rows.lengths, rows.slots, rows.offsets
            out, *caches = native.Kernels.attention(*qkv, rotation, norms, *caches, *where, window=window, **options)
            return out.reshape(*out.shape[:2], -1), tuple(caches)

        return attend


def choose(build_dir: pathlib.Path, progress: Callable[[str], None] = lambda line: None) -> tuple[Backend, str]:
    """The backend for this machine, and a line that says which and why. `progress` is told before what takes long."""
    platform = jax.default_backend()
    if platform != "cpu":
        return XlaBackend(), f"XLA on {platform}"
    kernels = native.load(build_dir, progress=progress)
    if isinstance(kernels, str):
        return XlaBackend(), f"XLA on the CPU, without native kernels: {kernels}"
    return NativeBackend(kernels), f"native kernels ({kernels.isa}, {kernels.threads} threads)"
