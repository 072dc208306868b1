"""What the steps of a program replace on the device, and the small functions, compiled there, that change a part of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxlora.engine import sampling
from jaxlora.engine.sampling import History
from jaxlora.kv_cache import KVCache
from jaxlora.updates import update_slice


@struct.dataclass
class State:
    """What a step reads and replaces."""

    cache: KVCache
    history: History


def read_positions(cache: KVCache, source: Array, start: Array, *, length: int) -> KVCache:
    """The keys and values of positions `[start, start + length)` of one slot, each `[1, K, length, C]`."""

    def part(whole: Array) -> Array:
        shape = (1, whole.shape[1], length, whole.shape[3])
        return jax.lax.dynamic_slice(whole, (source, 0, start, 0), shape, allow_negative_indices=False)

    return jax.tree.map(part, cache)


def write_positions(state: State, part: KVCache, slot: Array, start: Array) -> State:
    """The state with what `read_positions` gave in the cache of a slot, from position `start` on."""
    return State(jax.tree.map(lambda whole, new: update_slice(whole, new, (slot, 0, start, 0)), state.cache, part), state.history)


def record_prompt(state: State, slots: Array, tokens: Array, starts: Array, lengths: Array) -> State:
    """The state with a part of the prompt of one slot in its history: as `sampling.record_prompt`, for one row."""
    one = np.int32(1)
    return State(state.cache, sampling.record_prompt(state.history, one, slots, tokens, starts, lengths, jnp.zeros(1, jnp.int32)))


def empty_slot(state: State, slot: Array) -> State:
    """The state with zeros for all keys and values of a slot."""

    def emptied(cache: Array) -> Array:
        return update_slice(cache, jnp.zeros((1, *cache.shape[1:]), cache.dtype), (slot, 0, 0, 0))

    return State(jax.tree.map(emptied, state.cache), state.history)


def is_usable(tree: Any) -> bool:
    """Whether no array of it was given up, or computed by what failed; waits for them. False without any."""
    arrays = jax.tree.leaves(tree)
    try:
        jax.block_until_ready(arrays)
    except Exception:  # of any kind that the failed computation raised
        return False
    return bool(arrays) and not any(array.is_deleted() for array in arrays)
