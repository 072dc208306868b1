"""How a training step computes on this machine: plain XLA, or the kernels of `jaxlora.native` on CPUs."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxlora import native
from jaxlora.lora import Adapter
from jaxlora.model import Gated, Input, Normed, attend_whole, values
from jaxlora.native import Dropout
from jaxlora.weights import Dense, Packing, PlainPacking
from training.log_probs import target_log_probs


class Machine(Protocol):
    """What differs between machines. Hashable, so that compiled steps are kept by it."""

    packing: Packing

    def attend(self, q: Array, k: Array, v: Array, window: int = 0, segments: Array | None = None) -> Array:
        """As `jaxlora.model.attend_whole`."""

    def adapted(self, dense: Any, adapter: Adapter, name: str, x: Array, dropout: Dropout | None) -> Array:
        """The linear layer `dense` of x `[..., in]`, with the module of that name, which the adapter (of one layer) has, and which reads
        what dropout leaves of x."""

    def values(self, x: Input) -> Array:
        """As `jaxlora.model.values`."""

    def log_probs(self, head: Any, hidden: Array, targets: Array, temperature: Array) -> Array:
        """As `training.log_probs.target_log_probs`, of the output layer as the machine's packing makes it."""


@dataclasses.dataclass(frozen=True)
class XlaMachine:
    """Plain JAX."""

    packing = PlainPacking()

    def attend(self, q: Array, k: Array, v: Array, window: int = 0, segments: Array | None = None) -> Array:
        return attend_whole(q, k, v, window, segments)

    def adapted(self, dense: Any, adapter: Adapter, name: str, x: Array, dropout: Dropout | None) -> Array:
        return adapter(name, dropout.apply(x) if dropout else x, dense(x))

    def values(self, x: Input) -> Array:
        return values(x)

    def log_probs(self, head: Dense, hidden: Array, targets: Array, temperature: Array) -> Array:
        return target_log_probs(head, hidden, targets, temperature)


@struct.dataclass
class FrozenDense:
    """A linear layer that does not learn: its weights `[in, out]`, packed as they are and transposed; `bias` is float32 `[out]` or None."""

    forward: native.Packed
    back: native.Packed
    bias: Array | None

    def __call__(self, x: Array) -> Array:
        """float32 `[..., in] -> [..., out]`, with a gradient for x."""
        y = native.frozen_linear(x, self.forward, self.back)
        return y if self.bias is None else y + self.bias


@dataclasses.dataclass(frozen=True)
class FrozenPacking:
    """Each linear layer on its own, since each may have an adapter; activations are float32."""

    panel: int
    groups = PlainPacking.groups

    def dense(self, kernels: list[Array], biases: list[Array | None]) -> FrozenDense:
        (kernel,), (bias,) = kernels, biases
        packed = native.pack_linear(kernel, self.panel, transposed=True), native.pack_linear(kernel, self.panel)
        return FrozenDense(*packed, None if bias is None else bias.astype(jnp.float32))

    def activations(self, dtype: jnp.dtype) -> jnp.dtype:
        return jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class NativeMachine:
    """The kernels of `jaxlora.native`, with weights in float32 or bfloat16 and activations in float32."""

    kernels: native.Kernels

    @property
    def packing(self) -> FrozenPacking:
        return FrozenPacking(self.kernels.panel)

    def attend(self, q: Array, k: Array, v: Array, window: int = 0, segments: Array | None = None) -> Array:
        if q.shape[-1] % 16:
            return attend_whole(q, k, v, window, segments)
        return native.causal_attention(q, k, v, segments, scale=q.shape[-1] ** -0.5, window=window)

    def adapted(self, dense: FrozenDense, adapter: Adapter, name: str, x: Array, dropout: Dropout | None) -> Array:
        scale = dict(adapter.scales)[name]
        y = native.adapted_linear(x, dense.forward, dense.back, adapter.a[name], adapter.b[name], scale, dropout)
        return y if dense.bias is None else y + dense.bias

    def values(self, x: Input) -> Array:
        if isinstance(x, Normed):
            return native.frozen_norm(*x)
        return native.swiglu(*x.gate_up) if isinstance(x, Gated) else x

    def log_probs(self, head: FrozenDense, hidden: Array, targets: Array, temperature: Array) -> Array:
        return native.frozen_log_probs(hidden, head.forward, head.back, head.bias, targets, temperature)


def choose(build_dir: pathlib.Path, dtype: str, progress: Callable[[str], None] = lambda line: None) -> Machine:
    """The fastest way to train with weights of that type here. `progress` is told before what takes long."""
    if jax.default_backend() != "cpu" or dtype == "float16":
        return XlaMachine()
    kernels = native.load(build_dir, progress=progress)
    return XlaMachine() if isinstance(kernels, str) else NativeMachine(kernels)
