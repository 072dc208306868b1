"""The forward pass, written once: training, prefill and decode call `forward` with their own attention and their own adapters.

Pure functions on `Weights`. Letters in shapes: B sequences, T tokens of each, D hidden, H query heads, K key/value heads, C head size, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlora.config import OUTPUT_LAYER, ModelConfig, Rope
from jaxlora.weights import Layer, Weights

# attend(the layer, its cache, what the linear layers QKV gave, window) -> [B,T,H*C] and the cache. Norms and rotates as `heads`.
Attend = Callable[[Layer, Any, tuple[Array, ...], int], tuple[Array, Any]]
# attend(q, k, v, window, segments), as `attend_whole`.
AttendWhole = Callable[[Array, Array, Array, int, Array | None], Array]

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")


class Normed(NamedTuple):
    """The `rms_norm` of x as what linear layers read, who compute it as they like."""

    x: Array
    scale: Array
    eps: float

    def values(self) -> Array:
        return rms_norm(*self)


class Gated(NamedTuple):
    """silu(gate) * up `[..., n]` (Shazeer 2020) as what a linear layer reads, of what the linear layers GATE_UP gave."""

    gate_up: tuple[Array, ...]

    def values(self) -> Array:
        # A gradient keeps gate and up only, and not each step between them and the result.
        return jax.checkpoint(lambda gate, up: jax.nn.silu(gate) * up)(*self.gate_up)


Input = Array | Normed | Gated


def values(x: Input) -> Array:
    """What linear layers read."""
    return x.values() if isinstance(x, (Normed, Gated)) else x


class Linears(Protocol):
    """How the linear layers of a step are computed, adapters included."""

    def own(self, layer: int | None) -> Any:
        """What `__call__` has to know of one layer, None being the output layer: a pytree. Layers whose parts have the same structure,
        shapes and static values are traced once."""

    def __call__(
        self, dense: Mapping[str, Any], own: Any, names: tuple[str, ...], x: Input, onto: Array | None = None
    ) -> tuple[Array, ...]:
        """`[..., out]` for each of the linear layers, which share x `[..., in]`, or one array that holds them side by side; `dense` are
        the weights, as `Layer.linears` has them. The result of a single layer is added to `onto`, where there is one."""


class Elements(Protocol):
    """What a step computes before and after its linear layers."""

    def embed(self, table: Array, tokens: Array, dtype: jnp.dtype) -> Array:
        """Rows `[..., D]` of table `[V, D]` for tokens int32 `[...]`, in the type of the activations."""

    def rms_norm(self, x: Array, scale: Array, eps: float) -> Array:
        """As `rms_norm`."""


class PlainElements:
    """Implements `Elements` in plain JAX."""

    def embed(self, table: Array, tokens: Array, dtype: jnp.dtype) -> Array:
        return table[tokens].astype(dtype)

    def rms_norm(self, x: Array, scale: Array, eps: float) -> Array:
        return rms_norm(x, scale, eps)


class Adapters(Protocol):
    """The adapters of a batch, whatever form they have."""

    def of_layer(self, config: ModelConfig, layer: int | None) -> "LayerAdapters":
        """Those of one layer, None being the output layer."""


class LayerAdapters(Protocol):
    """A pytree."""

    def __call__(self, name: str, x: Array, y: Array) -> Array:
        """y `[..., out]` with the update of the linear layer of that name for x `[..., in]` added; y, where it has none."""


class SeparateLinears:
    """Implements the call of `Linears` for those that compute one layer after the other, in plain JAX."""

    def one(self, dense: Any, own: Any, name: str, x: Array) -> Array:
        """`[..., out]` of one linear layer for x `[..., in]`."""
        raise NotImplementedError

    def values(self, x: Input) -> Array:
        """As the function of that name."""
        return values(x)

    def __call__(
        self, dense: Mapping[str, Any], own: Any, names: tuple[str, ...], x: Input, onto: Array | None = None
    ) -> tuple[Array, ...]:
        x = self.values(x)
        found = tuple(self.one(dense[name], own, name, x) for name in names)
        return found if onto is None else tuple(onto + y for y in found)


class PlainLinears(SeparateLinears):
    """Implements `Linears`: a product, then the adapters; None is the base model."""

    def __init__(self, config: ModelConfig, adapters: Adapters | None):
        self._config, self._adapters = config, adapters

    def own(self, layer: int | None) -> LayerAdapters | None:
        return self._adapters and self._adapters.of_layer(self._config, layer)

    def one(self, dense: Any, own: LayerAdapters | None, name: str, x: Array) -> Array:
        return own(name, x, dense(x)) if own else dense(x)


def forward(
    config: ModelConfig,
    weights: Weights,
    tokens: Array,
    attend: Attend,
    linears: Linears,
    elements: Elements,
    caches: Sequence[Any] = (),
    embedded: Callable[[Array], Array] = lambda x: x,
    remat: bool = False,
    wanted: Array | None = None,
) -> tuple[Array, list[Any]]:
    """Hidden states after the final norm, `[B, T, D]`, for `tokens` int32 `[B, T]`, and the caches as `attend` left them.

    The layers are unrolled, since a scan over stacked weights would copy them at every step on CPUs. Python traces one layer of a kind
    only: XLA inlines the calls.

    Arguments:
        caches: what `attend` gets of each layer; without them it gets None.
        embedded: what becomes of the embedded tokens `[B, T, D]` before the first layer.
        remat: a gradient keeps the input of each layer only, and computes the layer again.
        wanted: int32 `[N]`, which of all B T tokens hidden states are asked of: these are `[N, 1, D]`, and behind its attention the
            last layer computes no others.
    """
    eps = config.rms_norm_eps

    @functools.partial(jax.jit, static_argnames="window")
    def decoder_layer(layer: Layer, own: Any, cache: Any, x: Array, wanted: Array | None, *, window: int) -> tuple[Array, Any]:
        qkv = linears(layer.linears, own, QKV, Normed(x, layer.input_norm, eps))
        attended, cache = attend(layer, cache, qkv, window)
        if wanted is not None:
            x, attended = (y.reshape(-1, y.shape[-1])[wanted][:, None] for y in (x, attended))
        (x,) = linears(layer.linears, own, ("o_proj",), attended.astype(x.dtype), onto=x)
        gate_up = linears(layer.linears, own, GATE_UP, Normed(x, layer.post_norm, eps))
        (x,) = linears(layer.linears, own, ("down_proj",), Gated(gate_up), onto=x)
        return x, cache

    x = embedded(elements.embed(weights.embed, tokens, weights.final_norm.dtype))
    after = list(caches) or [None] * len(weights.layers)
    for index, layer in enumerate(weights.layers):
        run = functools.partial(decoder_layer, window=config.windows[index])
        ends = wanted if index + 1 == len(weights.layers) else None
        x, after[index] = (jax.checkpoint(run) if remat else run)(layer, linears.own(index), after[index], x, ends)
    return elements.rms_norm(x, weights.final_norm, eps), after


def project(weights: Weights, linears: Linears, hidden: Array) -> Array:
    """Logits in float32, `[..., V]`, from hidden states `[..., D]`."""
    return linears({OUTPUT_LAYER: weights.head}, linears.own(None), (OUTPUT_LAYER,), hidden)[0].astype(jnp.float32)


def logits(
    config: ModelConfig, weights: Weights, tokens: Array, adapters: Adapters | None = None, segments: Array | None = None
) -> Array:
    """Logits float32 `[B, T, V]` of whole sequences without a cache.

    Arguments:
        tokens: int32 `[B, T]`.
        adapters: what to apply, for example a `jaxlora.lora.Adapter`.
        segments: int32 `[B, T]`, the number of the packed example that a token belongs to; positions restart with each. None: one
            example a row.
    """
    linears = PlainLinears(config, adapters)
    return project(weights, linears, hidden_states(config, weights, tokens, linears, segments))


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
        turned = rotation(config.rope, config.head_dim, jnp.arange(tokens.shape[1]))
    if segments is not None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
        positions = positions - jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)
        turned = tuple(part[positions] for part in turned)
    turned = tuple(part[..., None, :] for part in turned)

    def attend(layer: Layer, cache: None, qkv: tuple[Array, ...], window: int) -> tuple[Array, None]:
        return (attend_all or attend_whole)(*heads(config, layer, qkv, turned), window, segments).reshape(*tokens.shape, -1), cache

    return forward(config, weights, tokens, attend, linears, PlainElements(), embedded=embedded, remat=remat)[0]


def heads(config: ModelConfig, layer: Layer, qkv: tuple[Array, ...], turned: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """q `[B,T,H,C]`, k and v `[B,T,K,C]` as attention takes them, from `[B,T,H*C]` and twice `[B,T,K*C]`: normalized, where the model does
    that, and turned by the `rotation` of their positions."""
    q, k, v = (y.reshape(*y.shape[:2], -1, config.head_dim) for y in qkv)
    if config.qk_norm:
        q, k = rms_norm(q, layer.q_norm, config.rms_norm_eps), rms_norm(k, layer.k_norm, config.rms_norm_eps)
    return rotate(q, *turned), rotate(k, *turned), v


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
    """Cosines and sines float32 `[..., head_dim / 2]` of the rotary embedding (Su et al. 2021), for positions `[...]`."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates `x [B, T, heads, head_dim]` by cosines and sines that fit `[B, T, heads, head_dim / 2]`; the two halves of a head form the
    pairs, as in Hugging Face checkpoints."""
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
