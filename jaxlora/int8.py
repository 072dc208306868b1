"""Weights of 8 bits: whole numbers with a scale that 32 of them share (as in Q8_0 of GGUF).

Knows arrays; knows nothing of models or of how weights are packed.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxlora.int8_size import GROUP


@struct.dataclass
class Int8:
    """Weights `[k, n]`: `values` int8 `[k, n]` between -127 and 127, times `scales` bfloat16 `[groups of k, n]`."""

    values: Array
    scales: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def widen(self, dtype: jnp.dtype) -> Array:
        """The weights `[k, n]` in that type."""
        steps = jnp.repeat(self.scales, GROUP, axis=0)[: self.values.shape[0]]
        return self.values.astype(dtype) * steps.astype(dtype)


@jax.jit
def quantize(w: Array) -> Int8:
    """Weights `[k, n]` of any floating-point type, each to the nearest of its group's 255 values, of which the outermost is the largest
    weight of the group."""
    k, n = w.shape
    groups = jnp.pad(w.astype(jnp.float32), ((0, -k % GROUP), (0, 0))).reshape(-1, GROUP, n)
    scales = (jnp.max(jnp.abs(groups), axis=1) / 127).astype(jnp.bfloat16)
    steps = jnp.where(scales > 0, scales, 1).astype(jnp.float32)[:, None]
    values = jnp.clip(jnp.round(groups / steps), -127, 127).astype(jnp.int8)
    return Int8(values.reshape(-1, n)[:k], scales)
