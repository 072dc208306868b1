"""The compiled kernels as JAX functions. See the package's docstring for the contract."""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxlora.int8 import Int8
from jaxlora.int8_size import GROUP
from jaxlora.native.twins import twin_attention

Array = jax.Array
PANEL = 32  # columns of a panel; kPanel in src/kernels.h


# What the weights of a `Packed` are, by the type that holds them.
KINDS = {"float32": "f32", "float16": "f16", "uint32": "bf16", "uint8": "i8"}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["k", "n"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """Weights [k, n] as `linear` reads them: float32 or float16 [panels, k, 32], pairs of bfloat16 as uint32 [panels, pairs of k, 32], or
    bytes of scales and int8 as uint8 [panels, groups of k, 32 * 2 + 32 * GROUP]."""

    data: Array
    k: int
    n: int

    @property
    def kind(self) -> str:
        return KINDS[str(self.data.dtype)]


class LoraModule(NamedTuple):
    """One module of a `lora` call. Offsets count values from `start` in a slot's part of the bank."""

    a: int  # offset of A [max_rank, k], of which the first rows up to the slot's rank are read
    b: int  # offset of B [max_rank, width], with the adapter's scale folded in; in a bank of int8 float32 [max_rank] for both follow, as bytes
    column: int  # first column of y
    width: int  # columns of y


def pack_linear(w: np.ndarray | Array | Int8, halves: bool = False) -> Packed:
    """Packs float32, bfloat16 or int8 weights [k, n], once. Needs their size in host memory besides.

    Arguments:
        halves: bfloat16 weights become float16, unless some are so large that sums might leave its range.

    Raises:
        TypeError: another type or number of dimensions.
    """
    if isinstance(w, Int8):
        return _pack_int8(w)
    w = np.asarray(w)
    if w.ndim != 2 or w.dtype not in (np.float32, ml_dtypes.bfloat16):
        raise TypeError(f"weights are float32 or bfloat16 [k, n], not {w.dtype} {list(w.shape)}")
    k, n = w.shape
    panels = -(-n // PANEL)
    if w.dtype == np.float32:
        data = np.zeros((k, panels * PANEL), np.float32)
    elif halves and _fits_halves(w):
        data = np.zeros((k, panels * PANEL), np.float16)
    else:
        pairs = np.zeros((-(-k // 2) * 2, panels * PANEL), np.uint16)
        pairs[:k, :n] = w.view(np.uint16)
        pairs = pairs.reshape(-1, 2, panels, PANEL).transpose(2, 0, 3, 1)
        return Packed(jnp.asarray(np.ascontiguousarray(pairs).view(np.uint32)[..., 0]), k, n)
    data[:, :n] = w
    return Packed(jnp.asarray(np.ascontiguousarray(data.reshape(k, panels, PANEL).transpose(1, 0, 2))), k, n)


def _pack_int8(w: Int8) -> Packed:
    k, n = w.shape
    groups, panels = -(-k // GROUP), -(-n // PANEL)
    # Without a sign, for an instruction that wants one factor so.
    values = np.full((groups * GROUP, panels * PANEL), 128, np.uint8)
    values[:k, :n] = np.asarray(w.values).view(np.uint8) + np.uint8(128)
    scales = np.zeros((groups, panels * PANEL), np.uint16)
    scales[:, :n] = np.asarray(w.scales).view(np.uint16)
    data = np.empty((panels, groups, PANEL * (2 + GROUP)), np.uint8)
    data[..., : PANEL * 2] = np.ascontiguousarray(scales.reshape(groups, panels, PANEL).transpose(1, 0, 2)).view(np.uint8)
    quads = values.reshape(groups, GROUP // 4, 4, panels, PANEL).transpose(3, 0, 1, 4, 2)
    data[..., PANEL * 2 :] = quads.reshape(panels, groups, PANEL * GROUP)
    return Packed(jnp.asarray(data), k, n)


def _fits_halves(w: np.ndarray) -> bool:
    # A sum has 32 products with values of x below 2. The bits of bfloat16 without the sign are in the order of the sizes, NaN last.
    limit = int(np.asarray(1000, ml_dtypes.bfloat16).view(np.uint16))
    return not w.size or int((w.view(np.uint16) & 0x7FFF).max()) < limit


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The loaded library. Its functions run on CPU devices only, and work under `jax.jit`."""

    path: pathlib.Path
    isa: str
    threads: int

    def pack_linear(self, w: np.ndarray | Array | Int8) -> Packed:
        """As the function of that name, in the form that is fastest here."""
        return pack_linear(w, halves=self.isa == "avx512fp16")

    @staticmethod
    def linear(x: Array, w: Packed) -> Array:
        """float32 [..., n] = x [..., k] @ w, in float32; where the weights are bfloat16, `avx512bf16` rounds x to it, and `avx512fp16`
        adds up in float16, 32 products at a time; where they are int8, x is rounded to that, with a scale for each GROUP of a row."""
        rows = x.reshape(-1, w.k).astype(jnp.float32)
        result = jax.ShapeDtypeStruct((rows.shape[0], w.n), jnp.float32)
        return jax.ffi.ffi_call(f"jaxlora_linear_{w.kind}", result)(rows, w.data).reshape(*x.shape[:-1], w.n)

    @staticmethod
    def attention(
        qkv: Array,
        rotation: tuple[Array, Array],
        norms: tuple[Array, Array] | None,
        k_cache: Array,
        v_cache: Array,
        starts: Array,
        lengths: Array,
        slots: Array,
        offsets: Array,
        *,
        scale: float,
        window: int = 0,
        eps: float = 0.0,
    ) -> tuple[Array, Array, Array]:
        """Stores the new keys and values, then attends causally over each row's own slot; queries and keys are turned by their positions
        before (rotary embedding), and have a root-mean-square norm before that where `norms` says so.

        Arguments:
            qkv: float32 [m, t, (heads + 2 kv) d], queries, keys and values side by side, of m t tokens.
            rotation: cosines and sines by position, float32 [positions, d / 2]; the halves of a head form the pairs.
            norms: float32 [d] each, the scales of the norms of queries and of keys.
            k_cache, v_cache: float32 or bfloat16 [slots, kv, s, d]. Updated in place where they are donated or temporary.
            starts: int32 [b], position of each row's first token.
            lengths: int32 [b], valid tokens of each row; 0 for an idle row. Other tokens store nothing and come out as zeros.
            slots: int32 [b], a different one for each row that isn't idle.
            offsets: int32 [b], ascending from 0: the number of each row's first token among all m t. It has those up to the next row's.
            scale: factor of the scores.
            window: how many positions a token sees, itself included; 0 for all.
            eps: epsilon of the norms.

        Returns:
            float32 [m, t, heads, d] and the two caches.

        Raises:
            jax.errors.JaxRuntimeError: as it runs, where a row lies outside of the cache or has no rotation.
        """
        _, kv, _, d = k_cache.shape
        if d % 16 or d > 256:
            return twin_attention(qkv, rotation, norms, k_cache, v_cache, starts, lengths, slots, offsets, scale=scale, window=window, eps=eps)
        out = jax.ShapeDtypeStruct((*qkv.shape[:2], qkv.shape[2] // d - 2 * kv, d), jnp.float32)
        caches = [jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in (k_cache, v_cache)]
        call = jax.ffi.ffi_call("jaxlora_attention", [out, *caches], input_output_aliases={5: 1, 6: 2})
        scales = norms or (np.zeros(0, np.float32),) * 2
        numbers = dict(window=np.int64(window), scale=np.float32(scale), eps=np.float32(eps))
        out, k_cache, v_cache = call(qkv, *rotation, *scales, k_cache, v_cache, starts, lengths, slots, offsets, **numbers)
        return out, k_cache, v_cache

    @staticmethod
    def lora(
        y: Array, x: Array, bank: Array, start: Array, row_slot: Array, rank: Array, *, modules: tuple[LoraModule, ...], max_rank: int
    ) -> Array:
        """y [m, n] with each row's low-rank update (x A^T) B added, for all modules that read the same x. In place if donated. Where the
        bank is bfloat16, `avx512bf16` rounds x and x A^T to it.

        Arguments:
            y: float32 [m, n].
            x: float32 [m, k].
            bank: float32, bfloat16 or int8 [slots, size].
            start: int32 scalar, where the part of a slot begins from which the modules count.
            row_slot: int32 [m], each row's slot of the bank, or -1 for none.
            rank: int32 [slots], true ranks, at most `max_rank`.
            modules: where their A and B lie, and which columns of y are theirs.
            max_rank: rows of every A and B in the bank.
        """
        columns = [np.array(column, np.int64) for column in zip(*modules)]
        call = jax.ffi.ffi_call("jaxlora_lora", jax.ShapeDtypeStruct(y.shape, y.dtype), input_output_aliases={0: 0})
        return call(
            y,
            x,
            bank,
            start,
            row_slot,
            rank,
            ranks=np.int64(max_rank),
            **dict(zip(("a_offsets", "b_offsets", "columns", "widths"), columns)),
        )

    @staticmethod
    def place(bank: Array, piece: Array, slot: Array, rank: Array, first: Array, *, offsets: tuple[int, ...], max_rank: int) -> Array:
        """The bank with a piece of an adapter in one slot. In place if donated.

        Arguments:
            bank: float32, bfloat16 or int8 [slots, size].
            piece: [n] of the same type, values `first` to `first + n` of the adapter: its parts one behind the other, each [rank, width].
                What lies beyond its end is left out.
            slot, rank, first: int32 scalars.
            offsets: where each part begins in a slot, [max_rank, width], and where the last one ends.
        """
        call = jax.ffi.ffi_call("jaxlora_place", jax.ShapeDtypeStruct(bank.shape, bank.dtype), input_output_aliases={0: 0})
        return call(bank, piece, slot, rank, first, offsets=np.array(offsets, np.int64), ranks=np.int64(max_rank))

    @staticmethod
    def embed(table: Array, tokens: Array) -> Array:
        """float32 [..., n]: the rows of float32 or bfloat16 table [v, n] that int32 tokens [...] name, the nearest one where there is none. (XLA on CPUs would widen the whole
        table where it takes rows of it in a loop.)"""
        result = jax.ShapeDtypeStruct((tokens.size, table.shape[1]), jnp.float32)
        return jax.ffi.ffi_call("jaxlora_embed", result)(table, tokens.reshape(-1)).reshape(*tokens.shape, -1)

    @staticmethod
    def rms_norm(x: Array, scale: Array, eps: float) -> Array:
        """float32 [..., n]: the root-mean-square norm of x over its last axis, times float32 scale [n]."""
        rows = x.reshape(-1, x.shape[-1])
        call = jax.ffi.ffi_call("jaxlora_rms_norm", jax.ShapeDtypeStruct(rows.shape, jnp.float32))
        return call(rows, scale, eps=np.float32(eps)).reshape(x.shape)

    @staticmethod
    def add_norm(x: Array, more: Array, scale: Array, eps: float) -> tuple[Array, Array]:
        """float32 [..., n] twice: x + more, and the `rms_norm` of that. The sum takes the place of x if donated."""
        rows = [a.reshape(-1, x.shape[-1]) for a in (x, more)]
        results = [jax.ShapeDtypeStruct(rows[0].shape, jnp.float32)] * 2
        call = jax.ffi.ffi_call("jaxlora_add_norm", results, input_output_aliases={0: 0})
        total, y = call(*rows, scale, eps=np.float32(eps))
        return total.reshape(x.shape), y.reshape(x.shape)

    @staticmethod
    def swiglu(x: Array) -> Array:
        """float32 [..., n]: silu(gate) * up, of gate and up side by side in float32 x [..., 2 n] (Shazeer 2020)."""
        rows = x.reshape(-1, x.shape[-1])
        call = jax.ffi.ffi_call("jaxlora_swiglu", jax.ShapeDtypeStruct((rows.shape[0], rows.shape[1] // 2), jnp.float32))
        return call(rows).reshape(*x.shape[:-1], -1)

    @staticmethod
    def argmax_logsumexp(logits: Array) -> tuple[Array, Array]:
        """Of finite float32 logits [m, n]: int32 [m] index of the first largest, float32 [m] log of the sum of exponentials."""
        rows = logits.shape[:1]
        results = [jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.float32)]
        return tuple(jax.ffi.ffi_call("jaxlora_summarize", results)(logits))

    @staticmethod
    def draw(logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, keys: Array, positions: Array) -> Array:
        """int32 [m], for rows with a temperature above 0 a draw from what top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al.
        2024) leave of softmax(logits / temperature); 0 for others. Equal probabilities at a threshold stay in.

        Arguments:
            logits: float32 [m, n].
            temperature, top_p, min_p: float32 [m]; a top_p of 1 or a min_p of 0 leaves nothing out.
            top_k: int32 [m], 0 for all.
            keys: uint32 [m, 2], raw keys of JAX's `threefry2x32`.
            positions: int32 [m], folded into the keys. Draws are the largest of the logits with Gumbel noise (`jax.random.gumbel`).
        """
        call = jax.ffi.ffi_call("jaxlora_draw", jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32))
        return call(logits, temperature, top_k, top_p, min_p, keys, positions)
