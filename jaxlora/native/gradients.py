"""The kernels that training needs, with their gradients: products with frozen weights, and causal attention over whole sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.native.kernels import Kernels
from jaxlora.native.operands import Packed

Array = jax.Array


@jax.custom_vjp
def frozen_linear(x: Array, w: Packed, transposed: Packed) -> Array:
    """float32 [..., n] = x [..., k] @ w, as `Kernels.linear`. Only x has a gradient, for which w is packed transposed as well: a product
    reads packed weights along one of their axes."""
    return Kernels.linear(x, w)


def _linear_forward(x: Array, w: Packed, transposed: Packed) -> tuple[Array, Packed]:
    return Kernels.linear(x, w), transposed


def _linear_backward(transposed: Packed, slope: Array) -> tuple[Array, None, None]:
    return Kernels.linear(slope, transposed), None, None


frozen_linear.defvjp(_linear_forward, _linear_backward)


def adapted_linear(x: Array, w: Packed, transposed: Packed, a: Array, b: Array, scale: float) -> Array:
    """float32 [..., n] = x @ w + scale * (x @ a^T) @ b^T with gradients for x, a and b.

    Arguments:
        x: float32 [..., k].
        w, transposed: weights [k, n] packed as they are and transposed.
        a: float32 [r, k].
        b: float32 [n, r].
    """
    if w.data.dtype == jnp.float16 or w.k % 16 or w.n % 16:
        y = frozen_linear(x, w, transposed)
        down = jnp.einsum("mk,rk->mr", x.reshape(-1, w.k), a, precision="highest")
        return y + scale * jnp.einsum("mr,nr->mn", down, b, precision="highest").reshape(y.shape)
    return _adapted(scale, x.reshape(-1, w.k), w, transposed, a, b).reshape(*x.shape[:-1], w.n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted(scale: float, x: Array, w: Packed, transposed: Packed, a: Array, b: Array) -> Array:
    return _adapted_forward(scale, x, w, transposed, a, b)[0]


def _adapted_forward(scale: float, x: Array, w: Packed, transposed: Packed, a: Array, b: Array) -> tuple[Array, tuple]:
    ranks = -(-a.shape[0] // 16) * 16  # filled up to whole vectors
    results = [jax.ShapeDtypeStruct((x.shape[0], width), jnp.float32) for width in (w.n, ranks)]
    y, h = jax.ffi.ffi_call("jaxlora_adapted", results)(x, w.data, a, b, scale=np.float32(scale))
    return y, (x, h, transposed, a, b)


def _adapted_backward(scale: float, kept: tuple, slope: Array) -> tuple[Array | None, ...]:
    x, h, transposed, a, b = kept
    results = [jax.ShapeDtypeStruct(like.shape, jnp.float32) for like in (x, a, b)]
    call = jax.ffi.ffi_call("jaxlora_adapted_gradient", results)
    dx, da, db = call(x, h, transposed.data, a, b, slope, scale=np.float32(scale))
    return dx, None, None, da, db


_adapted.defvjp(_adapted_forward, _adapted_backward)


def causal_attention(q: Array, k: Array, v: Array, segments: Array | None = None, *, scale: float, window: int = 0) -> Array:
    """Causal attention over whole sequences: float32 [b, t, heads, d]. The softmax is computed again for the gradient, so that nothing
    of the size of the scores is kept (Dao et al. 2022).

    Arguments:
        q: float32 [b, t, heads, d]; d is a multiple of 16.
        k, v: float32 [b, t, kv, d].
        segments: int32 [b, t]; a token sees those before it that have its number. None: all of them.
        scale: factor of the scores.
        window: how many positions a token sees, itself included; 0 for all.
    """
    segments = jnp.zeros((0, 0), jnp.int32) if segments is None else segments.astype(jnp.int32)
    return _causal(scale, window, q, k, v, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _causal(scale: float, window: int, q: Array, k: Array, v: Array, segments: Array) -> Array:
    return _call("jaxlora_causal", scale, window, q)(q, k, v, segments)


def _causal_forward(scale: float, window: int, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return _causal(scale, window, *inputs), inputs


def _causal_backward(scale: float, window: int, inputs: tuple[Array, ...], slope: Array) -> tuple[Array | None, ...]:
    return *_call("jaxlora_causal_gradient", scale, window, list(inputs[:3]))(*inputs, slope), None


_causal.defvjp(_causal_forward, _causal_backward)


def _call(target: str, scale: float, window: int, like: Array | list[Array]) -> functools.partial:
    results = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, jnp.float32), like)
    return functools.partial(jax.ffi.ffi_call(target, results), scale=np.float32(scale), window=np.int64(window))
