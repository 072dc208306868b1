"""Updates of a part of a large array in place. Knows arrays only."""

import jax
import jax.numpy as jnp
from jax import Array


def update_slice(whole: Array, part: Array, at: tuple[Array | int, ...]) -> Array:
    """`jax.lax.dynamic_update_slice`, in place where `whole` is donated. No index of `at` is negative.

    bfloat16 goes as its bits: XLA on CPUs computes nothing in bfloat16, and would convert the whole array to float32 and back.
    """
    if whole.dtype != jnp.bfloat16:
        return jax.lax.dynamic_update_slice(whole, part, at, allow_negative_indices=False)
    bits = [jax.lax.bitcast_convert_type(array, jnp.uint16) for array in (whole, part)]
    return jax.lax.bitcast_convert_type(update_slice(*bits, at), jnp.bfloat16)
