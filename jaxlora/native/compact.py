"""bfloat16 weights in 12 bits each, without loss but for the sign of zeros. What reads them is `src/compact.h`; `src/kernels.h` says how they lie.

The lower half of a weight stays as it is. Its upper half, the sign and seven bits of the exponent, becomes the place in a table of 16 that a
panel's weights share: seven exponents in a row with either sign, and zero. Weights with other exponents lie in a list.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
_TABLE, _BLOCK = 16, 16  # bytes, and pairs of k
_NO_PLACE = 0xFFFFFFFF


def pack_compact(pairs: Array, k: int) -> Array | None:
    """Pairs of bfloat16, uint32 [panels, pairs of k, 32], as uint16 [panels, size].

    Returns:
        None where a panel has more weights without a code than one for each eight of k.
    """
    codes, tables, uncoded = _codes(pairs)
    panels = len(codes)
    room = -(-(_TABLE + 8 * (k // 8 + 1)) // 64) * 64
    head = np.zeros((panels, room), np.uint8)
    entries = head[:, _TABLE:].view(np.uint32).reshape(panels, -1, 2)
    head[:, :_TABLE] = tables
    of_panel, place = np.divmod(np.flatnonzero(uncoded), uncoded.shape[1])
    counts = np.bincount(of_panel, minlength=panels)
    if counts.max(initial=0) >= entries.shape[1]:
        return None
    entry = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    entries[of_panel, entry, 0] = place
    entries[of_panel, entry, 1] = np.asarray(pairs).view(np.uint16).reshape(panels, -1)[of_panel, place]
    entries[np.arange(panels), counts, 0] = _NO_PLACE
    return jnp.concatenate([head.view(np.uint16), codes], axis=1)


@jax.jit
def _codes(pairs: Array) -> tuple[Array, Array, Array]:
    """Codes uint16 [panels, values], tables uint8 [panels, 16], and which weights [panels, weights] have no code."""
    panels, steps, panel = pairs.shape
    weights = jax.lax.bitcast_convert_type(pairs, jnp.uint16).reshape(panels, -1)
    upper = (weights >> 8).astype(jnp.uint8)
    exponent, zero = upper & 127, weights & 0x7FFF == 0
    top = jnp.maximum(exponent.max(axis=1), 8)
    fits = lambda base: (exponent > base[:, None]) & (exponent <= base[:, None] + 7)
    # The largest of a panel may be so few that it is better to list these than as many small ones.
    base = jnp.where(fits(top - 7).sum(axis=1) < fits(top - 8).sum(axis=1), top - 8, top - 7)
    coded = fits(base)
    places = jnp.arange(_TABLE, dtype=jnp.uint8)
    tables = jnp.where(places % 8 == 0, 0, places // 8 * 128 + base[:, None] + places % 8)
    place = jnp.where(coded, exponent - base[:, None] + upper // 128 * 8, 0)
    lower = jnp.where(coded, weights.astype(jnp.uint8), 0)

    def in_order(values: Array) -> Array:
        values = values.reshape(panels, steps, 2, panel // 8, 8).swapaxes(2, 3)
        return jnp.pad(values.reshape(panels, steps, -1, 8), ((0, 0), (0, -steps % _BLOCK), (0, 0), (0, 0)))

    of_two = lambda values: values.reshape(panels, -1, 2, 2 * panel // 8, 8)
    lowers = of_two(in_order(lower)).reshape(panels, -1, 4 * panel)
    places = of_two(in_order(place)).swapaxes(2, 3).reshape(panels, -1, 2 * panel, 2)
    both = jnp.concatenate([lowers, places[..., 0] | places[..., 1] << 4], axis=-1)
    return jax.lax.bitcast_convert_type(both.reshape(panels, -1, 2), jnp.uint16), tables.astype(jnp.uint8), ~coded & ~zero
