"""The kernels in plain JAX: what each computes, in its simplest form. The reference of the tests, and the path of every machine
without the library. Results agree within rounding, not bit for bit: the order of adding differs.
"""

import functools

import jax
import jax.numpy as jnp

from jaxlora.int8 import Int8
from jaxlora.int8_size import SCALE_BYTES
from jaxlora.lora_size import fill_up
from jaxlora.native.operands import LORA_PANEL, LoraRows, lora_depth

Array = jax.Array


def twin_linear(
    x: Array,
    w: Array | Int8,
    *,
    norm: tuple[Array, float] | None = None,
    gated: bool = False,
    onto: Array | None = None,
    adapters: LoraRows | None = None,
    live: Array | None = None,
) -> Array:
    """As `Kernels.linear`, of weights [k, n] that are not packed; x is never rounded, and rows that are not live are always cleared."""
    if isinstance(w, Int8):
        w = w.widen(jnp.float32)
    x = x.astype(jnp.float32)
    x = twin_rms_norm(x, *norm) if norm else twin_swiglu(x) if gated else x
    y = jnp.matmul(x, w.astype(jnp.float32), precision="highest")
    y = y if onto is None else onto + y
    y = _with_updates(y, x, adapters) if adapters else y
    if live is None:
        return y
    rows = jnp.arange(y.size // y.shape[-1]).reshape(*y.shape[:-1], 1)
    return jnp.where(rows < live, y, 0.0 if onto is None else onto)


def twin_attention(
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
    """As `Kernels.attention`."""
    _, kv, size, d = k_cache.shape
    heads = qkv.shape[2] // d - 2 * kv
    shape, qkv = (*qkv.shape[:2], heads, d), qkv.reshape(-1, heads + 2 * kv, d)
    tokens = jnp.arange(len(qkv))
    valid = tokens < lengths[:, None]  # [b, t], each row as if all tokens were its own
    positions, numbers = starts[:, None] + tokens, jnp.where(valid, offsets[:, None] + tokens, len(qkv))
    batch, chunk = valid.shape
    q, k_new, v_new = jnp.split(jnp.take(qkv, numbers, axis=0, mode="fill", fill_value=0), [heads, heads + kv], axis=2)
    q, k_new = (twin_rms_norm(x, scale, eps) for x, scale in zip((q, k_new), norms)) if norms else (q, k_new)
    cos, sin = (jnp.take(table, positions, axis=0, mode="clip")[:, :, None] for table in rotation)
    q, k_new = (_rotate(x, cos, sin) for x in (q, k_new))
    # Idle rows and tokens write outside of the cache, which `drop` ignores.
    at = (slots[:, None, None], jnp.arange(kv)[None, None, :], jnp.where(valid, positions, size)[:, :, None])
    k_cache = k_cache.at[at].set(k_new.astype(k_cache.dtype), mode="drop")
    v_cache = v_cache.at[at].set(v_new.astype(v_cache.dtype), mode="drop")
    keys, values = k_cache[slots].astype(jnp.float32), v_cache[slots].astype(jnp.float32)  # [b, kv, s, d]

    where = jnp.arange(size)
    seen = where <= positions[..., None]
    if window:
        seen &= where > positions[..., None] - window
    queries = q.reshape(batch, chunk, kv, heads // kv, -1)
    scores = jnp.einsum("btkgd,bksd->btkgs", queries, keys, precision="highest") * scale
    weights = jax.nn.softmax(jnp.where(seen[:, :, None, None], scores, -1e30), axis=-1)
    # What lies beyond a row's positions may be anything, NaN too.
    values = jnp.where((where < (starts + lengths)[:, None])[:, None, :, None], values, 0)
    out = jnp.einsum("btkgs,bksd->btkgd", weights, values, precision="highest").reshape(q.shape)
    return jnp.zeros((len(qkv), heads, d)).at[numbers].set(out, mode="drop").reshape(shape), k_cache, v_cache


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _with_updates(y: Array, x: Array, adapters: LoraRows) -> Array:
    bank, start, row_slot, rank, modules, max_rank = adapters
    k = x.shape[1]
    ranks = jnp.arange(max_rank)
    used = ranks < rank[:, None]  # [slot, r]
    own = row_slot[:, None] == jnp.arange(len(bank))  # [m, slot]
    mask = own[:, :, None] & used
    of_slot = rank[:, None, None]

    def values(offset: int, places: Array) -> Array:
        places = of_slot * (start + offset) + places
        # Ranks that a slot does not have may lie anywhere and hold anything.
        found = jnp.take_along_axis(bank, places.reshape(len(bank), -1), axis=1, mode="clip").reshape(places.shape)
        return jnp.where(used[:, :, None], found.astype(jnp.float32), 0)

    def place(row: Array, column: Array, rows: Array | int, columns: Array | int) -> Array:
        depth, panel = lora_depth(bank.dtype), column // LORA_PANEL
        width = jnp.minimum(LORA_PANEL, columns - panel * LORA_PANEL)
        return panel * LORA_PANEL * rows + row // depth * depth * width + column % LORA_PANEL * depth + row % depth

    for module in modules:
        filled = fill_up(module.width)
        a = values(module.a, place(jnp.arange(k), ranks[:, None], k, of_slot))
        b = values(module.b, place(ranks[:, None], jnp.arange(module.width), of_slot, filled))
        if bank.dtype == jnp.int8:
            a *= _scales(bank, rank * (start + module.b + filled), max_rank)[:, :, None]
        hidden = jnp.where(mask, jnp.einsum("mk,srk->msr", x, a, precision="highest"), 0)
        delta = jnp.einsum("msr,srn->mn", hidden, b, precision="highest")
        y = y.at[:, module.column : module.column + module.width].add(delta)
    return y


def _scales(bank: Array, begin: Array, count: int) -> Array:
    """float32 [slots, count] from so many bytes on in each slot."""
    places = begin[:, None] + jnp.arange(count * SCALE_BYTES)
    found = jnp.take_along_axis(bank, places, axis=1, mode="clip").reshape(len(bank), count, SCALE_BYTES)
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def twin_rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """As `Kernels.rms_norm`."""
    return scale * (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps))


def twin_swiglu(x: Array) -> Array:
    """silu(gate) * up of gate and up side by side (Shazeer 2020)."""
    gate, up = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * up


def twin_argmax_logsumexp(logits: Array) -> tuple[Array, Array]:
    """As `Kernels.argmax_logsumexp`."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), jax.nn.logsumexp(logits, axis=-1)


def twin_draw(logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, keys: Array, positions: Array) -> Array:
    """As `Kernels.draw`."""
    logits = logits / jnp.maximum(temperature, 1e-6)[:, None]
    filtered = jnp.any((top_k > 0) | (top_p < 1) | (min_p > 0))
    logits = jax.lax.cond(filtered, lambda: keep_likely(logits, top_k, top_p, min_p), lambda: logits)

    def noise(row: tuple[Array, Array, Array]) -> Array:
        key, position, warm = row
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.lax.cond(warm, lambda: jax.random.gumbel(key, logits.shape[1:]), lambda: jnp.zeros(logits.shape[1:]))

    # The Gumbel-max trick: the largest of logit + noise is a draw from the softmax. On CPUs only the rows that need it pay for it.
    rows = keys, positions, temperature > 0
    added = jax.lax.platform_dependent(rows, cpu=functools.partial(jax.lax.map, noise), default=jax.vmap(noise))
    return jnp.where(temperature > 0, jnp.argmax(logits + added, axis=-1), 0).astype(jnp.int32)


def keep_likely(logits: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
    """Logits `[B, V]` with what top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024) leave out set to -inf.

    The thresholds are found by bisection on the bits of the numbers, which is exact and spares sorting the vocabulary. Ties at a
    threshold stay in.
    """
    order = _ordered(logits)

    def threshold(enough) -> Array:
        def bit(index: Array, found: Array) -> Array:
            candidate = found | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
            return jnp.where(enough(order >= candidate[:, None]), candidate, found)

        return jax.lax.fori_loop(0, 32, bit, jnp.zeros(logits.shape[0], jnp.uint32))[:, None]

    k = jnp.where(top_k > 0, top_k, logits.shape[1])
    kept = order >= threshold(lambda above: above.sum(axis=-1) >= k)
    shares = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    nucleus = threshold(lambda above: jnp.where(above, shares, 0.0).sum(axis=-1) >= top_p)
    nucleus = jnp.minimum(nucleus, order.max(axis=-1, keepdims=True))  # the most likely one stays, however small top_p is
    kept = kept & ((order >= nucleus) | (top_p >= 1)[:, None])
    kept = kept & (shares >= min_p[:, None] * shares.max(axis=-1, keepdims=True))
    return jnp.where(kept, logits, -jnp.inf)


def _ordered(x: Array) -> Array:
    """float32 as uint32 of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))
