"""One small run of every kernel against its twin, after a build: a compiler that gets vector code wrong (GCC 12 did for one
form of the attention kernel) must cost speed and not answers.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlora.int8 import quantize
from jaxlora.int8_size import GROUP
from jaxlora.native.dropout import Dropout
from jaxlora.native.gradients import adapted_linear, causal_attention, frozen_log_probs, frozen_norm, swiglu
from jaxlora.native.kernels import Kernels
from jaxlora.native.operands import LoraModule, LoraRows
from jaxlora.native.twins import twin_argmax_logsumexp, twin_attention, twin_draw, twin_linear, twin_rms_norm


def wrong_results(kernels: Kernels) -> list[str]:
    """Names of the kernels that fail, or whose results differ from their twins by more than rounding. Takes about five seconds on two cores, nearly all of
    them XLA's."""

    def is_right(check: Callable[[Kernels], bool]) -> bool:
        with jax.default_device(jax.local_devices(backend="cpu")[0]), contextlib.suppress(jax.errors.JaxRuntimeError):
            return check(kernels)
        return False

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)  # halves that
    try:
        with ThreadPoolExecutor(os.cpu_count()) as checkers:
            return [name for name, right in zip(_CHECKS, checkers.map(is_right, _CHECKS.values())) if not right]
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def _close(got: object, want: object) -> bool:
    """Where a value was rounded to bfloat16, a last bit of float32 may have decided to which of two neighbours, and these are up to 2**-7 apart."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return all(np.allclose(*(np.asarray(each, np.float32) for each in (a, b)), 2**-7 if a.dtype == jnp.bfloat16 else 1e-3, 1e-3) for a, b in pairs)


def _near(got: Array, want: Array, error: float) -> bool:
    """Whether no value differs by more than a share of their usual size: for sums of products that were rounded."""
    return bool(jnp.max(jnp.abs(got - want)) < error * jnp.sqrt(jnp.mean(want**2)))


def _linear(dtype: str, kernels: Kernels) -> bool:
    w = jnp.asarray(_normal(75, 70), dtype)
    x = _normal(17, 75).astype(jnp.bfloat16).astype(np.float32)  # exact in either type
    packed, want = kernels.pack_linear(w), twin_linear(x, w)
    if packed.data.dtype == jnp.float16:
        return _near(kernels.linear(x, packed), want, 5e-3)
    return _close(kernels.linear(x, packed), want)


def _int8(kernels: Kernels) -> bool:
    x = np.round(_normal(17, 75) * 40).clip(-126, 126)
    x[:, ::GROUP] = 127  # so that its scales are 1
    w = quantize(_normal(75, 70))
    return _close(kernels.linear(x, kernels.pack_linear(w)), twin_linear(x, w))


def _attention(dtype: str, kernels: Kernels) -> bool:
    caches = [jnp.asarray(_normal(2, 2, 200, 64) + i, dtype) for i in range(2)]
    angles = _normal(200, 32)
    new = _normal(2, 20, 10 * 64), (np.cos(angles), np.sin(angles)), (_normal(64), _normal(64) + 1)
    rest = jnp.int32([150, 0]), jnp.int32([30, 1]), jnp.int32([1, 0]), jnp.int32([0, 35])
    options = dict(scale=0.125, window=60, eps=1e-5)
    both = (jax.jit(functools.partial(attention, **options)) for attention in (kernels.attention, twin_attention))
    return _close(*(attention(*new, *caches, *rest) for attention in both))


def _lora(dtype: str, kernels: Kernels) -> bool:
    y, x, nothing = jnp.asarray(_normal(7, 100)), _normal(7, 70), np.zeros((70, 100), np.float32)
    where = jnp.int32(2), jnp.int32([1, 0, 1, -1, 1, 1, 1]), jnp.int32([24, 8])
    adapters = LoraRows(_bank(dtype), *where, (LoraModule(0, 70, 3, 90),), 24)
    got = kernels.linear(x, kernels.pack_linear(nothing), onto=y, adapters=adapters)
    want = jax.jit(lambda x, y: twin_linear(x, nothing, onto=y, adapters=adapters))(x, y)
    return _near(got - y, want - y, 2e-2) if dtype == "bfloat16" and kernels.isa in ("amxbf16", "avx512bf16") else _close(got, want)


def _bank(dtype: str) -> Array:
    parts = _normal(2, 24 * (2 + 70 + 96))
    if dtype != "int8":
        return jnp.asarray(parts, dtype)
    values = (parts * 30).astype(np.int8)
    bank = np.concatenate([values, np.zeros((2, 24 * 4), np.int8)], axis=1)
    for slot, rank in enumerate((24, 8)):
        bank[slot, rank * 168 :][: rank * 4] = (_normal(rank) / 900).view(np.int8)
    return jnp.asarray(bank)


def _causal(kernels: Kernels) -> bool:
    q, k, v, slope = (_normal(2, 70, heads, 64) + at for at, heads in enumerate((4, 2, 2, 4)))
    segments = jnp.asarray(np.repeat([[0, 1], [2, 3]], 35, axis=1))
    attend = functools.partial(causal_attention, scale=0.125, window=30)
    return _close(*(_with_slopes(f, slope, q, k, v) for f in (lambda *qkv: attend(*qkv, segments), _twin_causal(segments))))


def _twin_causal(segments: Array) -> Callable[..., Array]:
    batch, length = segments.shape
    at = jnp.arange(length)
    seen = (segments[:, :, None] == segments[:, None, :]) & (at <= at[:, None]) & (at > at[:, None] - 30)

    def attend(q: Array, k: Array, v: Array) -> Array:
        keys, values = (jnp.repeat(array, q.shape[2] // k.shape[2], axis=2) for array in (k, v))
        scores = jnp.where(seen[:, None], jnp.einsum("bthd,bshd->bhts", q, keys, precision="highest") * 0.125, -1e30)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), values, precision="highest")

    return attend


# What follows is compared with NumPy, as XLA would take longer to compile its gradients than all else here takes.
def _adapted(kernels: Kernels) -> bool:
    w, x, a, b, slope = _normal(64, 96), _normal(70, 64), _normal(5, 64), _normal(96, 5), _normal(70, 96)
    packed = kernels.pack_linear(w), kernels.pack_linear(w.T)

    def is_right(dropout: Dropout | None, left: np.ndarray) -> bool:
        h, dh = (x * left) @ a.T, 0.3 * slope @ b
        want = x @ w + 0.3 * h @ b.T, (slope @ w.T + (dh @ a) * left, dh.T @ (x * left), 0.3 * slope.T @ h)
        return _close(_with_slopes(lambda x, a, b: adapted_linear(x, *packed, a, b, 0.3, dropout), slope, x, a, b), want)

    dropout = Dropout(jnp.array([5, 6], jnp.uint32), jnp.uint32(7), 0.6)
    stays = np.asarray(jax.jit(lambda: dropout.stays(x.shape))())
    return is_right(None, np.ones_like(x)) and is_right(dropout, stays * dropout.factor)


def _log_probs(kernels: Kernels) -> bool:
    # More of the vocabulary than is multiplied at a time.
    w, x, slope, targets = _normal(32, 2100), _normal(5, 32), _normal(5), np.int32([0, 2099, -1, 2048, 7])
    packed, one = (kernels.pack_linear(w), kernels.pack_linear(w.T)), np.float32(1)
    exponentials, wanted = np.exp(x @ w), targets >= 0
    shares = exponentials / exponentials.sum(1, keepdims=True)
    found = np.where(wanted, np.log(shares[np.arange(5), targets]), 0)
    along = ((np.eye(2100, dtype=np.float32)[targets] - shares) * (slope * wanted)[:, None]) @ w.T
    return _close(_with_slopes(lambda x: frozen_log_probs(x, *packed, None, targets, one), slope, x), (found, (along,)))


def _elements(kernels: Kernels) -> bool:
    x, up, scale, slope = _normal(17, 70), _normal(17, 70) + 1, _normal(70), _normal(17, 70) - 1
    factor, sigmoid = 1 / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5), 1 / (1 + np.exp(-x))
    back = scale * slope - x * factor**2 * (scale * slope * x).mean(1, keepdims=True)
    norm = scale * x * factor, (factor * back,)
    gate = x * sigmoid * up, (slope * up * sigmoid * (1 + x * (1 - sigmoid)), slope * x * sigmoid)
    return _close(_with_slopes(lambda x: frozen_norm(x, scale, 1e-5), slope, x), norm) and _close(_with_slopes(swiglu, slope, x, up), gate)


def _with_slopes(function: Callable[..., Array], slope: np.ndarray, *inputs: np.ndarray) -> tuple:
    @jax.jit
    def compiled(slope: Array, *inputs: Array) -> tuple:
        result, back = jax.vjp(function, *inputs)
        return result, back(slope)

    return compiled(slope, *inputs)


def _summary(kernels: Kernels) -> bool:
    logits = _normal(3, 1000) * 10
    return _close(kernels.argmax_logsumexp(logits), twin_argmax_logsumexp(logits))


def _draw(kernels: Kernels) -> bool:
    # Several rows of each kind of setting, of which not all may come out by chance.
    rows, settings = 12, dict(top_k=jnp.int32([0, 7, 0]), top_p=jnp.float32([1, 1, 0.8]), min_p=jnp.float32([0, 0.01, 0]))
    settings = {name: jnp.resize(values, rows) for name, values in settings.items()}
    keys, positions = jnp.arange(2 * rows, dtype=jnp.uint32).reshape(rows, 2), jnp.arange(rows) * 1000
    arguments = jnp.asarray(_normal(rows, 1003) * 3), jnp.full(rows, 0.8), *settings.values(), keys, positions
    return bool(jnp.array_equal(kernels.draw(*arguments), jax.jit(twin_draw)(*arguments)))


def _around(kernels: Kernels) -> bool:
    x, w, onto, norm = _normal(17, 140) * 4, _normal(70, 33), _normal(17, 33), (_normal(70), 1e-5)
    inputs = (x[:, :70], dict(norm=norm)), (x, dict(gated=True))
    twin = lambda x, before: jax.jit(lambda x: twin_linear(x, w, onto=onto, **before))(x)
    done = [(kernels.linear(x, kernels.pack_linear(w), onto=onto, **before), twin(x, before)) for x, before in inputs]
    return all(_close(*pair) for pair in done) and _close(kernels.rms_norm(x[:, :70], *norm), twin_rms_norm(x[:, :70], *norm))


def _rows(kernels: Kernels) -> bool:
    tokens = jnp.int32([[3, 0], [9, 3]])
    tables = [jnp.asarray(_normal(10, 70), dtype) for dtype in ("float32", "bfloat16")]
    return all(_close(kernels.embed(table, tokens), table[tokens]) for table in tables)


_CHECKS = {
    f"{name} in {dtype}": functools.partial(check, dtype)
    for name, check in (("linear", _linear), ("attention", _attention), ("lora", _lora))
    for dtype in ("float32", "bfloat16")
} | {
    "linear in int8": _int8, "lora in int8": functools.partial(_lora, "int8"), "causal_attention": _causal, "adapted_linear": _adapted,
    "log_probs": _log_probs, "norm and gate": _elements,
    "argmax_logsumexp": _summary, "draw": _draw, "embed": _rows, "norm, gate and sum around linear": _around,
}  # fmt: skip
