"""Preference training: `python -m training.dpo --data pairs.jsonl --name alice/sql --loss sigmoid`.

Learns from pairs of a better and a worse answer (DPO, IPO, hinge, ORPO), or from single judged answers (KTO). Data: see
`training.pairs`. The reference is the adapter that the run starts from, `--init`, or the base model for a new one.
"""

from jaxlora import allocator

if __name__ == "__main__":
    allocator.restart()  # first, as what follows takes seconds

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxlora.lora import Adapter
from training import pairs
from training.batches import Batches
from training.losses import preference
from training.losses.preference import PreferenceLoss, UnpairedLoss
from training.method import Example, Method, Window
from training.options import Options, option
from training.references import with_references
from training.scores import Scorer
from training.script import run_script
from training.step import make_evaluation
from training.task import Task, say

KINDS = (*preference.PAIRWISE, "kto")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoOptions(Options):
    """What preference training adds."""

    loss: str = option("sigmoid", f"one of {', '.join(KINDS)}")
    beta: float = option(0.1, "how much a distance from the reference costs (IPO's tau, ORPO's lambda)", low=1e-6)
    label_smoothing: float = option(0.0, "share of labels that are taken to be wrong (sigmoid, robust)", low=0, high=0.499)
    reference: str = option("start", "what answers are compared with: `start`, the adapter of --init, or `base`")
    precompute_reference: bool = option(
        False, "compute the reference's log-probabilities once, before training, and keep them in the cache (pairs only)"
    )
    desirable_weight: float = option(1.0, "KTO: weight of good answers", low=0)
    undesirable_weight: float = option(1.0, "KTO: weight of bad answers", low=0)
    epochs: float = option(1.0, "times that the data is gone through", low=0)
    lr: float = option(5e-5, "largest learning rate", low=0)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.loss not in KINDS:
            found.append(f"--loss: {self.loss!r} is none of {', '.join(KINDS)}")
        if self.label_smoothing and self.loss not in preference.SMOOTHED:
            found.append(f"--label-smoothing: {self.loss} has none; {' and '.join(preference.SMOOTHED)} do")
        if self.reference not in ("start", "base"):
            found.append(f"--reference: {self.reference!r} is neither start nor base")
        if self.precompute_reference and self.loss in ("kto", *preference.WITHOUT_REFERENCE):
            found.append(f"--precompute-reference: is for losses on pairs with a reference, which {self.loss} is not")
        return found


@dataclasses.dataclass(frozen=True)
class KtoSource:
    """Batches with KTO's z0 of the whole window in the place of the answers to other prompts that it is estimated on."""

    batches: Batches
    divergence: Callable[[Adapter, Window], float]

    @property
    def steps_per_epoch(self) -> float:
        return self.batches.steps_per_epoch

    def window(self, step: int, adapter: Adapter) -> Window:
        window = self.batches.window(step)
        return preference.with_kl(window, self.divergence(adapter, window))

    def lines(self, step: int) -> Sequence[int]:
        return self.batches.lines(step)

    def start_metrics(self, step: int) -> Mapping[str, float]:
        return self.batches.start_metrics(step)


def build(task: Task) -> Method:
    """The method for a task. Raises SetupError for data that can't be used."""
    options = task.options
    if options.loss == "kto":
        encode = functools.partial(pairs.labelled, task.encoder)
        loss = UnpairedLoss(options.beta, options.desirable_weight, options.undesirable_weight)
    else:
        encode = functools.partial(pairs.pair, task.encoder)
        loss = PreferenceLoss(options.loss, options.beta, options.label_smoothing)
    learned, held_out = task.examples(lambda record: (encode(record), pairs.question(task.encoder, record)))
    examples, held_out_examples = ([example for example, _ in found] for found in (learned, held_out))
    if options.loss == "kto":
        source = KtoSource(task.batches(_with_others(task, examples)), _divergence(task))
        held_out_examples = _with_others(task, held_out_examples)
    else:
        if options.precompute_reference:
            examples, held_out_examples = (_with_references(task, found) for found in (examples, held_out_examples))
        source = task.batches(examples)
    questions = [question for _, question in held_out if question is not None]
    return Method(
        "dpo", loss, source, held_out=task.held_out(held_out_examples), questions=questions, reference=options.reference
    )


def _with_references(task: Task, found: Sequence[Example]) -> list[Example]:
    return with_references(
        found,
        Scorer(task.base.config, task.weights, task.base.machine),
        _reference(task),
        model={**task.base.identity(), "dtype": task.base.dtype},
        folder=task.base.settings.cache_dir / "references",
        rows=2 * task.options.micro_batch,
        buckets=task.options.buckets,
        say=say,
    )


def _reference(task: Task) -> Adapter | None:
    return task.start if task.options.reference == "start" else None


def _with_others(task: Task, found: Sequence[Sequence[Example]]) -> list[Example]:
    return pairs.with_others([example for examples in found for example in examples], task.options.max_length)


def _divergence(task: Task) -> Callable[[Adapter, Window], float]:
    evaluate = make_evaluation(task.base.config, preference.other_divergence, machine=task.base.machine)
    reference = _reference(task)

    def divergence(adapter: Adapter, window: Window) -> float:
        # On one device: an adapter that is spread over several can't be mixed with what lies on one.
        terms = evaluate(jax.device_get(adapter), task.weights, reference, window)
        return float(terms.total / jnp.maximum(terms.count, 1))

    return divergence


def main(argv: Sequence[str] | None = None) -> int:
    return run_script("dpo", DpoOptions, __doc__.splitlines()[0], build, argv)


if __name__ == "__main__":
    sys.exit(main())
