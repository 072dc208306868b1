"""The compiled kernels as JAX functions. See the package's docstring for the contract."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.int8 import Int8
from jaxlora.native.operands import LoraModule, LoraRows, Packed, pack_linear
from jaxlora.native.twins import twin_attention

Array = jax.Array
_NOTHING, _NO_NUMBERS = np.zeros(0, np.float32), np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The loaded library. Its functions run on CPU devices only, and work under `jax.jit`."""

    path: pathlib.Path = dataclasses.field(repr=False)  # so that what is named after the kernels has the same name wherever they lie
    isa: str
    threads: int
    panel: int
    """Columns of a panel of packed weights."""

    def pack_linear(self, w: np.ndarray | Array | Int8, transposed: bool = False) -> Packed:
        """As the function of that name, in the form that is fastest here."""
        return pack_linear(w, self.panel, self.isa == "avx512fp16", self.isa == "amxbf16", transposed)

    @staticmethod
    def linear(
        x: Array,
        w: Packed,
        *,
        norm: tuple[Array, float] | None = None,
        gated: bool = False,
        onto: Array | None = None,
        adapters: LoraRows | None = None,
        live: Array | None = None,
        cleared: bool = False,
    ) -> Array:
        """float32 [..., n] = x [..., k] @ w, in float32; where the weights are bfloat16, `amxbf16` and `avx512bf16` round x to it,
        and `avx512fp16` adds up in float16, 32 products at a time; where they are int8, x is rounded to that, with a scale for each GROUP of a row.

        Arguments:
            norm: float32 scale [k] and epsilon: the `rms_norm` of x is multiplied.
            gated: silu(gate) * up is multiplied, of gate and up side by side in x [..., 2 k] (Shazeer 2020).
            onto: float32 [..., n], what the product is added to. The sum takes its place if donated.
            adapters: the low-rank updates of the rows. Where the bank is bfloat16, `amxbf16` and `avx512bf16` round what is multiplied,
                and what lies between A and B, to it.
            live: int32 scalar: only so many rows are computed. The others, which have no adapter, are as in `onto`, else they may hold anything.
            cleared: they are zeros then, where nothing is added to.

        Raises:
            jax.errors.JaxRuntimeError: as it runs, where `live` is not from 0 to the number of rows, or a row that is not live has an adapter.
        """
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        result = jax.ShapeDtypeStruct((rows.shape[0], w.n), jnp.float32)
        scale, eps = norm or (_NOTHING, 0)
        bank, start, row_slot, rank, modules, max_rank = adapters or (_NOTHING, *(_NO_NUMBERS,) * 3, (), 0)
        places = np.ascontiguousarray(np.array(modules, np.int64).reshape(-1, len(LoraModule._fields)).T)
        call = jax.ffi.ffi_call("jaxlora_linear", result, input_output_aliases={} if onto is None else {3: 0})
        added = _NOTHING if onto is None else onto.reshape(result.shape)
        living = _NO_NUMBERS if live is None else live.reshape(1)
        options = dict(zip(("a_offsets", "b_offsets", "columns", "widths"), places), ranks=np.int64(max_rank), gated=gated, cleared=cleared)
        y = call(rows, w.data, scale, added, bank, start, row_slot, rank, living, eps=np.float32(eps), **options)
        return y.reshape(*x.shape[:-1], w.n)

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
        before (rotary embedding), and have a root-mean-square norm before that where `norms` says so. In float32; but where the cache is
        bfloat16 and heads are multiples of 32, `amxbf16` leaves queries and weights 16 bits.

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
    def place(bank: Array, piece: Array, slot: Array, number: Array) -> Array:
        """The bank with a piece of an adapter in one slot. In place if donated.

        Arguments:
            bank: float32, bfloat16 or int8 [slots, size].
            piece: [n] of the same type, values `number * n` to `(number + 1) * n` of the slot. What lies beyond its end is left out.
            slot, number: int32 scalars.
        """
        call = jax.ffi.ffi_call("jaxlora_place", jax.ShapeDtypeStruct(bank.shape, bank.dtype), input_output_aliases={0: 0})
        return call(bank, piece, slot, number)

    @staticmethod
    def embed(table: Array, tokens: Array) -> Array:
        """float32 [..., n]: the rows of float32 or bfloat16 table [v, n] that int32 tokens [...] name, the nearest one where there is none. (XLA on CPUs would widen the whole
        table where it takes rows of it in a loop.)"""
        result = jax.ShapeDtypeStruct((tokens.size, table.shape[1]), jnp.float32)
        return jax.ffi.ffi_call("jaxlora_embed", result)(table, tokens.reshape(-1)).reshape(*tokens.shape, table.shape[1])

    @staticmethod
    def rms_norm(x: Array, scale: Array, eps: float) -> Array:
        """float32 [..., n]: the root-mean-square norm of x over its last axis, times float32 scale [n]."""
        rows = x.reshape(-1, x.shape[-1])
        call = jax.ffi.ffi_call("jaxlora_rms_norm", jax.ShapeDtypeStruct(rows.shape, jnp.float32))
        return call(rows, scale, eps=np.float32(eps)).reshape(x.shape)

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
