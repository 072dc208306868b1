"""Weights of 8 bits: whole numbers with a scale that 32 of them share (as in Q8_0 of GGUF), or, in adapters, all of a rank.

Knows arrays; knows nothing of models or of how weights are packed.
"""

import jax
import jax.numpy as jnp
import numpy as np
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


def quantize_ranks(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two sides of a low-rank product, `a [r, in]` and `b [r, out]`, as int8 between -127 and 127, and what a rank of both is to be
    multiplied by: the bytes of a float32, int8 `[r, SCALE_BYTES]`. It comes in between them, where there is one value for a rank."""
    (a, a_steps), (b, b_steps) = _by_row(a), _by_row(b)
    return a, b, (a_steps * b_steps).view(np.int8)


def _by_row(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = values.astype(np.float32)
    steps = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(values / np.where(steps > 0, steps, 1)).astype(np.int8), steps
