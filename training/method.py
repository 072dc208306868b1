"""What a training method hands to the trainer: a loss, and where the batches of each step come from.

The trainer (`training.trainer`) knows nothing else about a method.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxlora.lora import Adapter
from training.losses import Loss

# Arrays by name, `[M, B, ...]`: M micro-batches of B examples.
Window = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Example:
    """One encoded example: the `lines` of the data file that it came from, and its arrays. Those with one axis are sequences,
    which are padded to the bucket that fits the longest; those without are single values."""

    lines: tuple[int, ...]
    arrays: Mapping[str, np.ndarray]

    @property
    def length(self) -> int:
        """The longest of its sequences, in tokens."""
        return max(len(array) for array in self.arrays.values() if array.ndim == 1)

    @property
    def tokens(self) -> int:
        """How many tokens the model computes for it, at least."""
        return sum(
            len(array) for name, array in self.arrays.items() if array.ndim == 1 and not name.endswith(("mask", "segments"))
        )


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt as token ids with the answer that the data gives: what task metrics compare with."""

    line: int
    prompt: tuple[int, ...]
    answer: str


class Source(Protocol):
    """The data of a run, as a function of the step: the position in the data is one number."""

    steps_per_epoch: float
    """Optimizer steps that go once over the data."""

    def window(self, step: int, adapter: Adapter) -> Window:
        """The micro-batches of optimizer step `step`, from 0. `adapter` is the one being trained as it is before this step, for
        methods that sample from it; others take no notice."""

    def lines(self, step: int) -> Sequence[int]:
        """The lines of the data file that the step takes, for messages."""

    def start_metrics(self, step: int) -> Mapping[str, float]:
        """What is known about the step's data and belongs into the metrics log, for example rewards. `tokens`, if it is
        there, is how many tokens the step computes: it becomes the tokens/s of the log."""


class HeldOut(Protocol):
    """Data for evaluation."""

    def windows(self) -> Iterator[Window]:
        """All of it, once, in windows of the shapes that `Source` has."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One training method, ready to run.

    `reference` says which model `Loss.reference` is: `start` (the adapter that the run started from; the base model for a new
    one) or `base`. `questions` are held out, too: task metrics judge the answers to them. `scores` gives an adapter's scores on
    held-out data where the method has some of its own, `eval_loss` among them if `held_out` has no windows. `facts` go into the
    config hash and the provenance: what defines the method beside the options.
    """

    name: str
    loss: Loss
    source: Source
    held_out: HeldOut | None = None
    questions: Sequence[Question] = ()
    scores: Callable[[Adapter], Mapping[str, float]] | None = None
    reference: str = "start"
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
