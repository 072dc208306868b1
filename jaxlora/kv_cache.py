"""The key/value cache of the serving slots, and attention over it. Knows positions and slots; knows no requests.

Letters in shapes: S slots, L cache length, B sequences in a step, T tokens of each, H query heads, K key/value heads, C head size.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxlora.config import ModelConfig
from jaxlora.kv_length import BLOCK, cache_length
from jaxlora.updates import update_slice

_NEGATIVE = -1e30


@struct.dataclass
class KVCache:
    """Keys and values by layer, each `[S, K, L, C]`: one array a layer, so that a donated cache is updated in place."""

    k: tuple[Array, ...]
    v: tuple[Array, ...]

    @classmethod
    def empty(cls, config: ModelConfig, slots: int, max_seq_len: int, chunk: int, dtype: str = "float32") -> "KVCache":
        shape = (slots, config.num_kv_heads, cache_length(max_seq_len, chunk), config.head_dim)
        return cls(
            tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)), tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
        )


@struct.dataclass
class Rows:
    """Which tokens of which slots a step computes.

    `slots`, `starts` and `lengths` are int32 `[B]`: the slot of a sequence, the position of its first token in this step, and how many
    of its tokens are real (0: an idle row). `offsets`, int32 `[B]`, ascending from 0: the number of its first token among all B T; it has
    those up to the next sequence's first: T of them, or in steps that read prompts any number. `every_slot` says that row b is slot b for all slots,
    which spares a gather.
    """

    slots: Array
    starts: Array
    lengths: Array
    offsets: Array
    every_slot: bool = struct.field(pytree_node=False, default=False)

    def positions(self, length: int) -> Array:
        """int32 `[B, length]`."""
        return self.starts[:, None] + jnp.arange(length, dtype=jnp.int32)

    def live(self) -> tuple[Array, Array]:
        """int32 scalars: how many rows, and how many tokens, there are up to the last one that is real."""
        real = self.lengths > 0
        last = jnp.max(jnp.where(real, jnp.arange(1, len(real) + 1, dtype=jnp.int32), 0))
        return last, jnp.max(jnp.where(real, self.offsets + self.lengths, 0))

    def of_tokens(self, values: Array, count: int) -> Array:
        """int32 `[count]` for all tokens: the value, of int32 `[B]` above -1, that their sequence has; -1 for what belongs to none."""
        tokens, first = jnp.arange(count, dtype=jnp.int32), self.offsets[:, None]
        own = (tokens >= first) & (tokens < first + self.lengths[:, None])
        return jnp.max(jnp.where(own, values[:, None], -1), axis=0)


def write(cache: Array, new: Array, rows: Rows) -> Array:
    """The cache `[S, K, L, C]` with `new [B, T, K, C]` at the rows' positions.

    One dynamic_update_slice a row stays in place where a scatter would not. What a short row writes behind its last token is
    overwritten before anything attends to it; an idle row writes to the scratch stretch at the end.
    """
    batch, length = new.shape[:2]
    starts = jnp.where(rows.lengths > 0, rows.starts, cache.shape[2] - length)
    new = new.astype(cache.dtype).swapaxes(1, 2)
    for row in range(batch):
        slot = row if rows.every_slot else rows.slots[row]
        cache = update_slice(cache, new[row][None], (slot, 0, starts[row], 0))
    return cache


def attend(q: Array, k_cache: Array, v_cache: Array, rows: Rows, window: int = 0) -> Array:
    """Causal attention of q `[B, T, H, C]` over the live part of the cache -> `[B, T, H, C]`.

    A loop over blocks with a running softmax (Milakov and Gimelshein 2018) that ends at the longest live sequence. A block that holds
    nothing for a row leaves it bitwise as it was, so a row's result does not depend on how long the others are.
    """
    batch, length, heads, size = q.shape
    kv_heads = k_cache.shape[1]
    groups = heads // kv_heads
    q = q.reshape(batch, length, kv_heads, groups, size).astype(jnp.float32) * size**-0.5
    positions = rows.positions(length)[:, None, None, :, None]

    def block_of(cache: Array, start: Array) -> Array:
        if rows.every_slot:
            block = jax.lax.dynamic_slice_in_dim(cache, start, BLOCK, axis=2)
        else:
            shape = (1, kv_heads, BLOCK, size)
            block = jnp.concatenate([jax.lax.dynamic_slice(cache, (rows.slots[row], 0, start, 0), shape) for row in range(batch)])
        return block.astype(jnp.float32)

    def step(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        start = index * BLOCK
        scores = jnp.einsum("btkgc,bksc->bkgts", q, block_of(k_cache, start), precision="highest")
        where = start + jnp.arange(BLOCK)
        mask = where <= positions
        if window:
            mask = mask & (where > positions - window)
        new_top = jnp.maximum(top, jnp.max(jnp.where(mask, scores, _NEGATIVE), axis=-1))
        shares = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
        keep = jnp.exp(top - new_top)
        added = jnp.einsum("bkgts,bksc->bkgtc", shares, block_of(v_cache, start), precision="highest")
        return new_top, total * keep + shares.sum(axis=-1), out * keep[..., None] + added

    shape = (batch, kv_heads, groups, length)
    initial = jnp.full(shape, _NEGATIVE), jnp.zeros(shape), jnp.zeros((*shape, size))
    live = jnp.max(jnp.where(rows.lengths > 0, rows.starts + rows.lengths, 0))
    _, total, out = jax.lax.fori_loop(0, (live + BLOCK - 1) // BLOCK, step, initial)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)
