"""The model as losses see it: log-probabilities of given tokens under the base model with an adapter.

Only the adapter gets gradients.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxlora.config import OUTPUT_LAYER, ModelConfig
from jaxlora.lora import Adapter
from jaxlora.model import Input, SeparateLinears, hidden_states, project
from jaxlora.native import Dropout
from jaxlora.weights import Weights
from training.keys import number_of
from training.log_probs import of_targets
from training.machine import Machine, XlaMachine


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
        machine: what computes; `weights` are packed for it.
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
        linears = AdaptedLinears(self, self.adapter or Adapter({}, {}, ()), seed)
        hidden = hidden_states(self.config, self.weights, tokens, linears, segments, self._embedded, self.remat, self.machine.attend)
        wanted = jnp.ones_like(tokens) if wanted is None else wanted
        # The state at t - 1 predicts token t.
        hidden, targets, wanted = (
            hidden[:, :-1].reshape(-1, hidden.shape[-1]),
            tokens[:, 1:].reshape(-1),
            wanted[:, 1:].reshape(-1),
        )
        if self.adapter is not None and OUTPUT_LAYER in self.adapter.a:
            found = jnp.where(wanted != 0, of_targets(project(self.weights, linears, hidden) / temperature, targets), 0.0)
        else:
            targets = jnp.where(wanted != 0, targets, -1)
            found = self.machine.log_probs(self.weights.head, hidden, targets, jnp.float32(temperature))
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

    def values(self, x: Input) -> Array:
        return self.policy.machine.values(x)

    def one(self, dense: Any, own: LearningPart, name: str, x: Array) -> Array:
        if name not in own.adapter.a:
            return dense(x)
        share = self.policy.noise.dropout
        dropout = Dropout(self.seed, own.numbers[name], 1 - share) if share and self.seed is not None else None
        return self.policy.machine.adapted(dense, own.adapter, name, x, dropout)
