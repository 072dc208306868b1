"""The model as losses see it: log-probabilities of given tokens under the base model with an adapter.

Only the adapter gets gradients. Logits never lie in memory for more than a block of tokens.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxlora.config import OUTPUT_LAYER, ModelConfig
from jaxlora.lora import Adapter
from jaxlora.model import PlainLinears, SeparateLinears, hidden_states, project
from jaxlora.weights import Weights
from training.keys import number_of
from training.machine import Machine, XlaMachine

BLOCK = 256  # tokens whose logits are computed at the same time


@dataclasses.dataclass(frozen=True)
class Noise:
    """What is random in training. `dropout` is the share of the inputs of `lora_A` that are dropped, as in PEFT; `embeddings` is
    alpha of NEFTune (Jain et al. 2023): uniform noise of size alpha / sqrt(T D) on the embedded tokens."""

    dropout: float = 0.0
    embeddings: float = 0.0


@dataclasses.dataclass(frozen=True)
class Policy:
    """Implements `training.losses.LogProbs`.

    Arguments:
        adapter: None is the base model.
        noise: needs `key`; without a key there is none.
        machine: what computes attention; `weights` are packed for it.
        remat: keep the inputs of the layers only for the backward pass: less memory, a third more time.
    """

    config: ModelConfig
    weights: Weights
    adapter: Adapter | None
    key: Array | None = None
    noise: Noise = Noise()
    remat: bool = False
    machine: Machine = XlaMachine()

    def __call__(
        self, tokens: Array, segments: Array | None = None, temperature: float = 1.0, wanted: Array | None = None
    ) -> Array:
        seed = None if self.key is None else jax.random.bits(jax.random.fold_in(self.key, 1), (2,), jnp.uint32)
        linears = PlainLinears(self.config, None) if self.adapter is None else AdaptedLinears(self, self.adapter, seed)
        hidden = hidden_states(self.config, self.weights, tokens, linears, segments, self._embedded, self.remat, self.machine.attend)
        wanted = jnp.ones_like(tokens) if wanted is None else wanted
        # The state at t - 1 predicts token t.
        hidden, targets, wanted = (
            hidden[:, :-1].reshape(-1, hidden.shape[-1]),
            tokens[:, 1:].reshape(-1),
            wanted[:, 1:].reshape(-1),
        )
        if self.adapter is not None and OUTPUT_LAYER in self.adapter.a:
            found = jnp.where(wanted != 0, _of_targets(project(self.weights, linears, hidden) / temperature, targets), 0.0)
        else:
            found = target_log_probs(self.weights.head, hidden, jnp.where(wanted != 0, targets, -1), jnp.float32(temperature))
        return jnp.pad(found.reshape(tokens.shape[0], -1), ((0, 0), (1, 0)))

    def _embedded(self, x: Array) -> Array:
        if self.key is None or not self.noise.embeddings:
            return x
        size = self.noise.embeddings / (x.shape[1] * x.shape[2]) ** 0.5
        return x + jax.random.uniform(jax.random.fold_in(self.key, 0), x.shape, jnp.float32, -size, size).astype(x.dtype)


@struct.dataclass
class LearningPart:
    """The modules of one layer, and for each a number that tells it from those of other layers."""

    adapter: Adapter
    numbers: dict[str, np.uint32]


@dataclasses.dataclass(frozen=True)
class AdaptedLinears(SeparateLinears):
    """Implements `jaxlora.model.Linears` for the adapter of a policy, with its noise, which `seed` (uint32 `[2]`) decides; None: without."""

    policy: Policy
    adapter: Adapter
    seed: Array | None

    def own(self, layer: int | None) -> LearningPart:
        config = self.policy.config
        numbers = {name: number_of(config.module_path(layer, name)) for name in config.names(layer)}
        return LearningPart(self.adapter.of_layer(config, layer), numbers)

    def one(self, dense: Any, own: LearningPart, name: str, x: Array) -> Array:
        dropout = self.policy.noise.dropout
        if name not in own.adapter.a:
            return dense(x)
        if self.seed is None or not dropout:
            return self.policy.machine.adapted(dense, own.adapter, name, x)
        stays = kept(self.seed, own.numbers[name], 1 - dropout, x.shape)
        return own.adapter(name, jnp.where(stays, x / (1 - dropout), 0).astype(x.dtype), dense(x))


def kept(seed: Array, number: Array, share: float, shape: tuple[int, ...]) -> Array:
    """bool of that shape, each true with probability `share`: a hash of its index, of the number of what draws (uint32) and of a seed (uint32 `[2]`).

    A step of a thousand tokens draws 150 million of them with the default model: `jax.random` took a quarter of the step for that on CPUs, and
    two thirds of its compilation. The hash is the finalizer of MurmurHash3 (Appleby 2011).
    """
    first, second = _mixed(seed[0] ^ number), _mixed(seed[1] + number)
    index = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return _mixed(_mixed(index + first) ^ second) < jnp.uint32(share * (2**32 - 1))


def _mixed(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def target_log_probs(head: Any, hidden: Array, targets: Array, temperature: Array) -> Array:
    """float32 `[N]`: log-softmax of `head(hidden) / temperature` at the targets; 0 where a target is -1.

    The head is frozen, so a token's gradient with respect to its hidden state is one vector, computed together with the logits: a
    block of logits is made once and thrown away. Blocks without any target are skipped, for which tokens with a target are sorted
    to the front.

    Arguments:
        head: `[..., D] -> [..., V]`, with `transposed`: a `jaxlora.weights.Dense`, or what the machine's packing makes of it.
        hidden: `[N, D]`.
        targets: int32 `[N]`.
    """
    count = hidden.shape[0]
    order = jnp.argsort(targets < 0, stable=True)
    block = min(BLOCK, count)
    filling = -count % block
    sorted_hidden = jnp.pad(hidden[order], ((0, filling), (0, 0)))
    sorted_targets = jnp.pad(targets[order], (0, filling), constant_values=-1)
    found = _blocks(head, sorted_hidden.reshape(-1, block, hidden.shape[1]), sorted_targets.reshape(-1, block), temperature)
    return jnp.zeros(count, jnp.float32).at[order].set(found.reshape(-1)[:count])


@jax.custom_vjp
def _blocks(head: Any, hidden: Array, targets: Array, temperature: Array) -> Array:
    """hidden `[K, block, D]`, targets `[K, block]` -> `[K, block]`."""

    def block(hidden: Array, targets: Array) -> Array:
        return jnp.where(targets < 0, 0.0, _of_targets(head(hidden).astype(jnp.float32) / temperature, targets))

    return _map_blocks(block, hidden, targets, lambda: jnp.zeros(targets.shape[1], jnp.float32))


def _blocks_forward(head: Any, hidden: Array, targets: Array, temperature: Array) -> tuple[Array, tuple[Any, ...]]:
    def block(hidden: Array, targets: Array) -> tuple[Array, Array]:
        logits = head(hidden).astype(jnp.float32) / temperature
        found = _of_targets(logits, targets)
        # d log p(target) / d logits = onehot(target) - softmax
        slope = jax.nn.one_hot(targets, logits.shape[1]) - jax.nn.softmax(logits)
        slope = jnp.where((targets < 0)[:, None], 0.0, slope).astype(hidden.dtype)
        along = head.transposed(slope) / temperature
        return jnp.where(targets < 0, 0.0, found), along

    size, width = targets.shape[1], hidden.shape[2]
    found, along = _map_blocks(
        block, hidden, targets, lambda: (jnp.zeros(size, jnp.float32), jnp.zeros((size, width), jnp.float32))
    )
    return found, (along, jnp.zeros((), hidden.dtype))


def _blocks_backward(kept: tuple[Any, ...], slope: Array) -> tuple[Any, ...]:
    along, like = kept
    return None, (slope[..., None] * along).astype(like.dtype), None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _map_blocks(block: Any, hidden: Array, targets: Array, nothing: Any) -> Any:
    def run(_: None, inputs: tuple[Array, Array]) -> tuple[None, Any]:
        return None, jax.lax.cond(jnp.any(inputs[1] >= 0), block, lambda *_: nothing(), *inputs)

    return jax.lax.scan(run, None, (hidden, targets))[1]


def _of_targets(logits: Array, targets: Array) -> Array:
    """log-softmax of `[N, V]` at the targets `[N]`; -1 gives a number without meaning."""
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    return picked - jax.nn.logsumexp(logits, axis=1)
