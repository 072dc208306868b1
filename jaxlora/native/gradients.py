"""The kernels that training needs, with their gradients: products with frozen weights, norms, gates, log-probabilities of tokens, and causal
attention over whole sequences."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.native.dropout import Dropout
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


def adapted_linear(
    x: Array, w: Packed, transposed: Packed, a: Array, b: Array, scale: float, dropout: Dropout | None = None
) -> Array:
    """float32 [..., n] = x @ w + scale * (dropout(x) @ a^T) @ b^T with gradients for x, a and b.

    Arguments:
        x: float32 [..., k].
        w, transposed: weights [k, n] packed as they are and transposed.
        a: float32 [r, k].
        b: float32 [n, r].
    """
    if w.data.dtype == jnp.float16 or w.k % 16 or w.n % 16:
        y = frozen_linear(x, w, transposed)
        down = jnp.einsum("mk,rk->mr", (dropout.apply(x) if dropout else x).reshape(-1, w.k), a, precision="highest")
        return y + scale * jnp.einsum("mr,nr->mn", down, b, precision="highest").reshape(y.shape)
    drawn, limit, factor = (np.zeros(0, np.uint32), np.uint32(0)), 0, np.float32(1)
    if dropout:  # the kernel mixes seed and number: XLA would compile that for each module
        drawn, limit, factor = (dropout.seed, dropout.number), dropout.limit, dropout.factor
    return _adapted((np.float32(scale), np.int64(limit), factor), x.reshape(-1, w.k), w, transposed, a, b, *drawn).reshape(*x.shape[:-1], w.n)


_NUMBERS = ("scale", "limit", "factor")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted(numbers: tuple, *arrays: Any) -> Array:
    return _adapted_forward(numbers, *arrays)[0]


def _adapted_forward(
    numbers: tuple, x: Array, w: Packed, transposed: Packed, a: Array, b: Array, *drawn: Array
) -> tuple[Array, tuple]:
    ranks = -(-a.shape[0] // 16) * 16  # filled up to whole vectors
    results = [jax.ShapeDtypeStruct((x.shape[0], width), jnp.float32) for width in (w.n, ranks)]
    y, h = jax.ffi.ffi_call("jaxlora_adapted", results)(x, w.data, a, b, *drawn, **dict(zip(_NUMBERS, numbers)))
    return y, (x, h, transposed, a, b, drawn)


def _adapted_backward(numbers: tuple, kept: tuple, slope: Array) -> tuple[Array | None, ...]:
    x, h, transposed, a, b, drawn = kept
    results = [jax.ShapeDtypeStruct(like.shape, jnp.float32) for like in (x, a, b)]
    call = jax.ffi.ffi_call("jaxlora_adapted_gradient", results)
    dx, da, db = call(x, h, transposed.data, a, b, slope, *drawn, **dict(zip(_NUMBERS, numbers)))
    return dx, None, None, da, db, None, None


_adapted.defvjp(_adapted_forward, _adapted_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def frozen_norm(x: Array, scale: Array, eps: float) -> Array:
    """As `Kernels.rms_norm`. Only x has a gradient."""
    return Kernels.rms_norm(x, scale, eps)


def _norm_forward(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    return Kernels.rms_norm(x, scale, eps), (x, scale)


def _norm_backward(eps: float, kept: tuple[Array, Array], slope: Array) -> tuple[Array, None]:
    rows, slopes = (y.reshape(-1, slope.shape[-1]) for y in (kept[0], slope))
    call = jax.ffi.ffi_call("jaxlora_rms_norm_gradient", jax.ShapeDtypeStruct(rows.shape, jnp.float32))
    return call(rows, kept[1], slopes, eps=np.float32(eps)).reshape(slope.shape), None


frozen_norm.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """float32 [..., n]: silu(gate) * up (Shazeer 2020). Its gradient keeps these two only."""
    return _swiglu("jaxlora_swiglu", 1, gate, up)[0]


def _swiglu_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, ...]:
    return tuple(_swiglu("jaxlora_swiglu_gradient", 2, *kept, slope))


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _swiglu(target: str, count: int, *inputs: Array) -> list[Array]:
    rows = [x.reshape(-1, x.shape[-1]) for x in inputs]
    results = [jax.ShapeDtypeStruct(rows[0].shape, jnp.float32)] * count
    return [y.reshape(inputs[0].shape) for y in jax.ffi.ffi_call(target, results)(*rows)]


@jax.custom_vjp
def frozen_log_probs(x: Array, w: Packed, transposed: Packed, bias: Array | None, targets: Array, temperature: Array) -> Array:
    """float32 [m] = log_softmax((x @ w + bias) / temperature) at the targets, with a gradient for x, which is computed together with it: logits lie
    in memory for some tokens at a time only.

    Arguments:
        x: float32 [m, k].
        w, transposed: float32 or bfloat16 weights [k, n] packed as they are and transposed.
        bias: float32 [n].
        targets: int32 [m]; the result is 0 where one is negative, and nothing is computed.
        temperature: float32 scalar above 0.

    Raises:
        jax.errors.JaxRuntimeError: as it runs, where a target is n or more.
    """
    return _log_probs(x, w, transposed, bias, targets, temperature, False)[0]


def _log_probs_forward(x: Array, *others: Any) -> tuple[Array, Array]:
    return tuple(_log_probs(x, *others, True))


def _log_probs_backward(slopes: Array, slope: Array) -> tuple[Array | None, ...]:
    return slope[:, None] * slopes, None, None, None, None, None


frozen_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def _log_probs(
    x: Array, w: Packed, transposed: Packed, bias: Array | None, targets: Array, temperature: Array, sloped: bool
) -> list[Array]:
    """With the slopes of x, float32 [m, k], or without any, [0, k]."""
    m, k = x.shape
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((m,), (m if sloped else 0, k))]
    bias, factor = jnp.zeros(0) if bias is None else bias, (1 / temperature).astype(jnp.float32).reshape(1)
    return jax.ffi.ffi_call("jaxlora_log_probs", results)(x, w.data, transposed.data, bias, targets, factor, n=np.int64(w.n))


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
