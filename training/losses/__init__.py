"""Losses: pure functions from a batch to a sum, its denominator, and metrics.

The contract, for every method:

- A batch is a table of arrays by name whose first axis is the example, `[B, ...]`. Sequences are padded on the right with zeros
  to the length of their bucket. A row that is zero in every array is filling, not an example, and must add nothing to any sum.
- `mask` arrays, `[B, T]`, are 1 where the token is learned: entry t weighs the probability of `tokens[:, t]` given what is
  before it. The first token of a sequence is never learned.
- The trainer adds up `total` and `count` over all micro-batches and devices of a step in float32 and takes the gradient of
  `total / count`: so a step does not depend on how its examples were cut into micro-batches. `count` must not depend on the
  weights. A step whose count is 0 changes nothing.
- `metrics` are pairs of the same kind, (sum, denominator), and are added up the same way.

Knows no model: a loss sees log-probabilities only, through `LogProbs`.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from jax import Array

Batch = Mapping[str, Array]


class LogProbs(Protocol):
    """Log-probabilities under a model."""

    def __call__(
        self, tokens: Array, segments: Array | None = None, temperature: float = 1.0, wanted: Array | None = None
    ) -> Array:
        """float32 `[B, T]`: entry t is log p(tokens[:, t] | tokens before it), and 0 for t = 0.

        Arguments:
            tokens: int32 `[B, T]`.
            segments: int32 `[B, T]`, which packed example each token belongs to; None: one example a row. What a segment's first
                token gets has no meaning.
            temperature: divides the logits.
            wanted: `[B, T]`: where it is 0 the result is 0 as well, and the vocabulary is not computed. None: everywhere.
        """


class Terms(NamedTuple):
    """What a loss gives for a batch: float32 scalars."""

    total: Array
    count: Array
    metrics: dict[str, tuple[Array, Array]]


class Loss(Protocol):
    """A training method's loss."""

    def __call__(self, policy: LogProbs, reference: LogProbs, batch: Batch) -> Terms:
        """The terms of one batch.

        Arguments:
            policy: the model with the adapter that is being trained (dropout and noise on while training).
            reference: the model that the run started from, or the base model, as the method chose; carries no gradient. Costs a
                forward pass where it is called, and nothing where it isn't.
        """
