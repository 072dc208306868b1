"""Log-probabilities of given answers, outside of a training step: under the reference, or under the policy that sampled them."""

import functools

import jax
import numpy as np
from jax import Array

from jaxlora.config import ModelConfig
from jaxlora.lora import Adapter
from jaxlora.weights import Weights
from training.machine import Machine, XlaMachine
from training.policy import Policy


class Scorer:
    """One base model. Compiles once for each shape of micro-batch; computes what a step does, up to rounding."""

    def __init__(self, config: ModelConfig, weights: Weights, machine: Machine = XlaMachine()):
        self._config, self._weights, self._machine = config, weights, machine

    def __call__(
        self, adapter: Adapter | None, tokens: np.ndarray, mask: np.ndarray, temperature: float = 1.0
    ) -> np.ndarray:
        """float32 `[M, B, T]`: the log-probabilities of `tokens [M, B, T]` where `mask [M, B, T]` is not 0, else 0.

        Arguments:
            adapter: None is the base model.
        """
        temperature = np.float32(temperature)
        found = [
            _scores(self._config, self._machine, self._weights, adapter, *batch, temperature) for batch in zip(tokens, mask)
        ]
        return np.stack(jax.device_get(found))


@functools.partial(jax.jit, static_argnames=("config", "machine"))
def _scores(
    config: ModelConfig,
    machine: Machine,
    weights: Weights,
    adapter: Adapter | None,
    tokens: Array,
    mask: Array,
    temperature: Array,
) -> Array:
    return Policy(config, weights, adapter, machine=machine)(tokens, temperature=temperature, wanted=mask)
