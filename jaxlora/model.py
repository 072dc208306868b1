"""The forward pass, written once: training, prefill and decode call `forward` with their own attention and their own adapters.

Pure functions on `Weights`. Letters in shapes: B sequences, T tokens of each, D hidden, H query heads, K key/value heads, C head size, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlora.config import OUTPUT_LAYER, ModelConfig, Rope
from jaxlora.weights import Weights

# attend(layer, q [B,T,H,C], k [B,T,K,C], v [B,T,K,C]) -> [B,T,H,C]; the rotation has been applied.
Attend = Callable[[int, Array, Array, Array], Array]
# adapt(module path, x [B,T,in], y [B,T,out]) -> y with the LoRA update of that module added.
Adapt = Callable[[str, Array, Array], Array]


def no_adapter(path: str, x: Array, y: Array) -> Array:
    """The base model: `y` as it is."""
    return y


def forward(config: ModelConfig, weights: Weights, tokens: Array, positions: Array, attend: Attend, adapt: Adapt = no_adapter) -> Array:
    """Hidden states after the final norm, `[B, T, D]`, for `tokens` and `positions` int32 `[B, T]`.

    The layers are unrolled: a scan over stacked weights would copy them at every step on CPUs.
    """
    batch, length = tokens.shape
    x = weights.embed[tokens]
    cos, sin = rotation(config.rope, config.head_dim, positions)
    for index, layer in enumerate(weights.layers):
        paths = {linear.name: f"model.layers.{index}.{linear.path}" for linear in config.linears}

        def linear(name: str, x: Array) -> Array:
            return adapt(paths[name], x, layer.linears[name](x))

        h = rms_norm(x, layer.input_norm, config.rms_norm_eps)
        q = linear("q_proj", h).reshape(batch, length, config.num_heads, config.head_dim)
        k = linear("k_proj", h).reshape(batch, length, config.num_kv_heads, config.head_dim)
        v = linear("v_proj", h).reshape(batch, length, config.num_kv_heads, config.head_dim)
        if config.qk_norm:
            q = rms_norm(q, layer.q_norm, config.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, config.rms_norm_eps)
        attended = attend(index, rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + linear("o_proj", attended.reshape(batch, length, -1))
        h = rms_norm(x, layer.post_norm, config.rms_norm_eps)
        x = x + linear("down_proj", jax.nn.silu(linear("gate_proj", h)) * linear("up_proj", h))
    return rms_norm(x, weights.final_norm, config.rms_norm_eps)


def project(weights: Weights, hidden: Array, adapt: Adapt = no_adapter) -> Array:
    """Logits in float32, `[..., V]`, from hidden states `[..., D]`."""
    return adapt(OUTPUT_LAYER, hidden, weights.head(hidden)).astype(jnp.float32)


def logits(config: ModelConfig, weights: Weights, tokens: Array, lora: Adapt | None = None, segments: Array | None = None) -> Array:
    """Logits float32 `[B, T, V]` of whole sequences without a cache: the form that training uses.

    Arguments:
        tokens: int32 `[B, T]`.
        lora: adapters to apply, for example `jaxlora.lora.Adapter`.
        segments: int32 `[B, T]`, the number of the packed example that a token belongs to; positions restart with each. None: one
            example a row.
    """
    adapt = lora or no_adapter
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segments is not None:
        starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
        positions = positions - jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        return attend_whole(q, k, v, window=config.windows[layer], segments=segments)

    return project(weights, forward(config, weights, tokens, positions, attend, adapt), adapt)


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
