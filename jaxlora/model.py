"""The forward pass, written once: training, prefill and decode call `forward` with their own attention and their own adapters.

Pure functions on `Weights`. Letters in shapes: B sequences, T tokens of each, D hidden, H query heads, K key/value heads, C head size, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlora.config import OUTPUT_LAYER, ModelConfig, Rope
from jaxlora.weights import Layer, Weights

# attend(layer, q [B,T,H,C], k [B,T,K,C], v [B,T,K,C]) -> [B,T,H,C]; the rotation has been applied.
Attend = Callable[[int, Array, Array, Array], Array]
# linears(layer or None for the output layer, names of linear layers that share x, x [..., in]) -> one [..., out] for each name,
# adapters included.
Linears = Callable[[int | None, tuple[str, ...], Array], tuple[Array, ...]]
# adapt(module path, x [..., in], y [..., out]) -> y with the LoRA update of that module added.
Adapt = Callable[[str, Array, Array], Array]
# attend(q, k, v, window, segments), as `attend_whole`.
AttendWhole = Callable[[Array, Array, Array, int, Array | None], Array]

# norm(x [..., n], scale [n], epsilon) -> [..., n], as `rms_norm`.
Norm = Callable[[Array, Array, float], Array]

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")


def no_adapter(path: str, x: Array, y: Array) -> Array:
    """The base model: `y` as it is."""
    return y


def plain_linears(config: ModelConfig, weights: Weights, adapt: Adapt = no_adapter) -> Linears:
    """One product for each linear layer, with `adapt` applied to it."""
    return linears_by(config, weights, lambda path, dense, x: adapt(path, x, dense(x)))


def linears_by(config: ModelConfig, weights: Weights, compute: Callable[[str, Any, Array], Array]) -> Linears:
    """Each linear layer on its own: `compute(module path, layer of the weights, x [..., in])` gives `[..., out]`."""

    def linears(layer: int | None, names: tuple[str, ...], x: Array) -> tuple[Array, ...]:
        if layer is None:
            return (compute(OUTPUT_LAYER, weights.head, x),)
        return tuple(compute(config.module_path(layer, name), weights.layers[layer].linears[name], x) for name in names)

    return linears


def forward(
    config: ModelConfig,
    weights: Weights,
    tokens: Array,
    turned: tuple[Array, Array],
    attend: Attend,
    linears: Linears,
    norm: Norm,
    embedded: Callable[[Array], Array] = lambda x: x,
    remat: bool = False,
) -> Array:
    """Hidden states after the final norm, `[B, T, D]`, for `tokens` int32 `[B, T]`, whose positions have the `rotation` that `turned` gives.

    The layers are unrolled: a scan over stacked weights would copy them at every step on CPUs.

    Arguments:
        embedded: what becomes of the embedded tokens `[B, T, D]` before the first layer.
        remat: a gradient keeps the input of each layer only, and computes the layer again.
    """
    batch, length = tokens.shape
    cos, sin = turned

    def decoder_layer(index: int, layer: Layer, x: Array) -> Array:
        h = norm(x, layer.input_norm, config.rms_norm_eps)
        q, k, v = (y.reshape(batch, length, -1, config.head_dim) for y in linears(index, QKV, h))
        if config.qk_norm:
            q = norm(q, layer.q_norm, config.rms_norm_eps)
            k = norm(k, layer.k_norm, config.rms_norm_eps)
        attended = attend(index, rotate(q, cos, sin), rotate(k, cos, sin), v)
        (attended,) = linears(index, ("o_proj",), attended.astype(x.dtype).reshape(batch, length, -1))
        x = x + attended
        gate, up = linears(index, GATE_UP, norm(x, layer.post_norm, config.rms_norm_eps))
        (down,) = linears(index, ("down_proj",), jax.nn.silu(gate) * up)
        return x + down

    x = embedded(weights.embed[tokens].astype(weights.final_norm.dtype))
    for index, layer in enumerate(weights.layers):
        run = functools.partial(decoder_layer, index, layer)
        x = jax.checkpoint(run)(x) if remat else run(x)
    return norm(x, weights.final_norm, config.rms_norm_eps)


def project(linears: Linears, hidden: Array) -> Array:
    """Logits in float32, `[..., V]`, from hidden states `[..., D]`."""
    return linears(None, (OUTPUT_LAYER,), hidden)[0].astype(jnp.float32)


def logits(config: ModelConfig, weights: Weights, tokens: Array, lora: Adapt | None = None, segments: Array | None = None) -> Array:
    """Logits float32 `[B, T, V]` of whole sequences without a cache.

    Arguments:
        tokens: int32 `[B, T]`.
        lora: adapters to apply, for example `jaxlora.lora.Adapter`.
        segments: int32 `[B, T]`, the number of the packed example that a token belongs to; positions restart with each. None: one
            example a row.
    """
    linears = plain_linears(config, weights, lora or no_adapter)
    return project(linears, hidden_states(config, weights, tokens, linears, segments))


def hidden_states(
    config: ModelConfig,
    weights: Weights,
    tokens: Array,
    linears: Linears,
    segments: Array | None = None,
    embedded: Callable[[Array], Array] = lambda x: x,
    remat: bool = False,
    attend_all: AttendWhole | None = None,
) -> Array:
    """Hidden states `[B, T, D]` of whole sequences without a cache: the form that training uses. Arguments as for `logits` and `forward`.

    Arguments:
        attend_all: what computes as `attend_whole`, which is the default.
    """
    # A table, made once: XLA on CPUs would compute cosines and sines wherever a layer uses them.
    with jax.ensure_compile_time_eval():
        turned = rotation(config.rope, config.head_dim, jnp.arange(tokens.shape[1])[None])
    if segments is not None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
        positions = positions - jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)
        turned = tuple(part[0][positions] for part in turned)

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        return (attend_all or attend_whole)(q, k, v, config.windows[layer], segments)

    return forward(config, weights, tokens, turned, attend, linears, rms_norm, embedded, remat)


def attend_whole(q: Array, k: Array, v: Array, window: int = 0, segments: Array | None = None) -> Array:
    """Causal attention over whole sequences: q `[B,T,H,C]`, k and v `[B,T,K,C]` -> `[B,T,H,C]`. Softmax in float32."""
    batch, length, heads, size = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
    scores = jnp.einsum("btkgc,bskc->bkgts", q, k, precision="highest", preferred_element_type=jnp.float32) * size**-0.5
    t, s = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    mask = (s <= t) & (s > t - window) if window else s <= t
    mask = mask[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", shares, v, precision="highest").reshape(batch, length, heads, size)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), computed in float32, in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return scale * x32.astype(x.dtype)


def rotation(rope: Rope, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines float32 `[B, T, 1, head_dim / 2]` of the rotary embedding (Su et al. 2021)."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates `x [B, T, heads, head_dim]`; the two halves of a head form the pairs, as in Hugging Face checkpoints."""
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """float32 `[head_dim / 2]`, with `linear` or `llama3` scaling applied (Transformers, `modeling_rope_utils`)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return (frequencies / np.float32(rope.factor)).astype(np.float32)
    if rope.kind == "llama3":
        wavelengths = 2 * np.pi / frequencies
        ratio = rope.original_max_position / wavelengths
        smooth = np.clip((ratio - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
        return ((1 - smooth) * frequencies / rope.factor + smooth * frequencies).astype(np.float32)
    return frequencies
