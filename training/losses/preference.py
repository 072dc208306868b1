"""Losses that learn from better and worse answers: the DPO family, ORPO and KTO.

The formulas are functions of log-probabilities, one number for each pair or answer; `PreferenceLoss` and `UnpairedLoss` make of
them losses as `training.losses` defines them. Letters in shapes: B examples of a batch, T tokens.

A batch of pairs has `chosen`, `rejected` int32 `[B, T]` (prompt and answer) and `chosen_mask`, `rejected_mask` `[B, T]`; also
`chosen_reference`, `rejected_reference` float32 `[B]` where the reference's log-probabilities of the answers are known already.
A batch of single answers has `tokens`, `mask` and `desirable` `[B]`; `other` and `other_mask` `[B, T]`, the same prompts with
answers to other prompts; and `kl` float32 `[B]`, the same number everywhere, where the divergence is known already.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from training.losses import Batch, LogProbs, Terms


class Answers(NamedTuple):
    """One answer to each of B prompts: `logps` and `ref_logps` `[B]` are log-probabilities of whole answers (sums over their
    tokens) under the policy and under the reference, `tokens` `[B]` is how many tokens each has."""

    logps: Array
    ref_logps: Array
    tokens: Array

    @property
    def ratios(self) -> Array:
        """log pi(y|x) - log pi_ref(y|x), `[B]`: the implicit reward of DPO before beta."""
        return self.logps - self.ref_logps

    @property
    def means(self) -> Array:
        """The policy's log-probability of a token, averaged over the answer, `[B]`."""
        return self.logps / jnp.maximum(self.tokens, 1)


# pairwise(chosen, rejected, beta, label smoothing) -> loss of each pair `[B]`
Pairwise = Callable[[Answers, Answers, float, float], Array]


def sigmoid(chosen: Answers, rejected: Answers, beta: float, label_smoothing: float = 0.0) -> Array:
    """DPO (Rafailov et al. 2023, equation 7). `label_smoothing` is the share of labels that are taken to be flipped
    (conservative DPO, Mitchell 2023)."""
    margin = beta * (chosen.ratios - rejected.ratios)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def robust(chosen: Answers, rejected: Answers, beta: float, label_smoothing: float = 0.0) -> Array:
    """DPO whose expectation under labels flipped with probability `label_smoothing` < 0.5 is the loss under clean ones
    (Chowdhury et al. 2024, equation 12)."""
    margin = beta * (chosen.ratios - rejected.ratios)
    clean, flipped = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(chosen: Answers, rejected: Answers, beta: float, label_smoothing: float = 0.0) -> Array:
    """The hinge loss on DPO's margin (SLiC, Zhao et al. 2023; RSO, Liu et al. 2023). Has no label smoothing."""
    return jax.nn.relu(1 - beta * (chosen.ratios - rejected.ratios))


def ipo(chosen: Answers, rejected: Answers, beta: float, label_smoothing: float = 0.0) -> Array:
    """IPO (Azar et al. 2023, equation 17) with `beta` for the paper's tau, on log-ratios averaged over tokens, as its authors
    run it. Has no label smoothing."""
    average = chosen.ratios / jnp.maximum(chosen.tokens, 1) - rejected.ratios / jnp.maximum(rejected.tokens, 1)
    return (average - 1 / (2 * beta)) ** 2


def orpo(chosen: Answers, rejected: Answers, beta: float, label_smoothing: float = 0.0) -> Array:
    """ORPO (Hong et al. 2024, equations 3 to 7), `beta` being the paper's lambda. Needs no reference, and has no label smoothing.

    The likelihood term is the paper's: the mean over the tokens of the chosen answer. TRL 1.16 takes in the prompt's tokens too.
    """
    return -chosen.means - beta * jax.nn.log_sigmoid(log_odds(chosen.means) - log_odds(rejected.means))


PAIRWISE: dict[str, Pairwise] = {"sigmoid": sigmoid, "robust": robust, "hinge": hinge, "ipo": ipo, "orpo": orpo}
SMOOTHED = ("sigmoid", "robust")
WITHOUT_REFERENCE = ("orpo",)


def kto(
    answers: Answers, desirable: Array, kl: Array, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Array:
    """KTO (Ethayarajh et al. 2024, equation 7): the loss of each answer, `[B]`.

    Arguments:
        desirable: bool `[B]`.
        kl: the paper's z0, the policy's divergence from the reference on answers to other prompts, at least 0, without a
            gradient.
    """
    gain = beta * (answers.ratios - kl)
    return jnp.where(desirable, desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain))


def log_odds(log_probability: Array) -> Array:
    """log(p / (1 - p)) from log p <= 0. Finite, with a finite gradient, also where p has rounded to 1."""
    log_probability = jnp.minimum(log_probability, -jnp.finfo(jnp.float32).eps)
    # Each branch loses its digits where the other is taken (Maechler 2012); the inner `where` keeps NaN out of its gradient.
    likely = log_probability > -0.6931472
    near_one = jnp.log(-jnp.expm1(jnp.where(likely, log_probability, -0.5)))
    far = jnp.log1p(-jnp.exp(jnp.where(likely, -1.0, log_probability)))
    return log_probability - jnp.where(likely, near_one, far)


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """A loss on pairs: the mean over pairs of one of `PAIRWISE`. Metrics have TRL's names."""

    kind: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __call__(self, policy: LogProbs, reference: LogProbs, batch: Batch) -> Terms:
        # One forward pass for both answers of a pair.
        tokens = jnp.concatenate([batch["chosen"], batch["rejected"]])
        mask = jnp.concatenate([batch["chosen_mask"], batch["rejected_mask"]])
        logps = answer_logps(policy, tokens, mask)
        if "chosen_reference" in batch:
            ref_logps = jnp.concatenate([batch["chosen_reference"], batch["rejected_reference"]])
        elif self.kind in WITHOUT_REFERENCE:
            ref_logps = jnp.zeros_like(logps)
        else:
            ref_logps = answer_logps(reference, tokens, mask)
        chosen, rejected = (Answers(*parts) for parts in zip(*(jnp.split(x, 2) for x in (logps, ref_logps, mask.sum(axis=1)))))
        live = live_rows(batch["chosen_mask"])
        count = live.sum()
        losses = PAIRWISE[self.kind](chosen, rejected, self.beta, self.label_smoothing)
        metrics = {name: (jnp.sum(value * live), count) for name, value in self._metrics(chosen, rejected).items()}
        return Terms(jnp.sum(losses * live), count, metrics)

    def _metrics(self, chosen: Answers, rejected: Answers) -> dict[str, Array]:
        if self.kind in WITHOUT_REFERENCE:
            chosen_rewards, rejected_rewards = self.beta * chosen.means, self.beta * rejected.means
        else:
            chosen_rewards, rejected_rewards = self.beta * chosen.ratios, self.beta * rejected.ratios
        return {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).astype(jnp.float32),
            "logps/chosen": chosen.logps,
            "logps/rejected": rejected.logps,
        }


@dataclasses.dataclass(frozen=True)
class UnpairedLoss:
    """KTO on single answers: the mean over answers. Metrics have TRL's names."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __call__(self, policy: LogProbs, reference: LogProbs, batch: Batch) -> Terms:
        mask = batch["mask"]
        live = live_rows(mask)
        if "kl" in batch:
            kl = batch["kl"]
        else:
            divergence = other_divergence(policy, reference, batch)
            kl = jnp.broadcast_to(jnp.maximum(divergence.total / jnp.maximum(divergence.count, 1), 0), live.shape)
        answers = Answers(
            answer_logps(policy, batch["tokens"], mask), answer_logps(reference, batch["tokens"], mask), mask.sum(axis=1)
        )
        desirable = batch["desirable"] > 0
        losses = kto(answers, desirable, jax.lax.stop_gradient(kl), self.beta, self.desirable_weight, self.undesirable_weight)
        good, bad = live * desirable, live * ~desirable
        rewards = self.beta * answers.ratios
        metrics = {
            "kl": (jnp.sum(kl * live), live.sum()),
            "rewards/chosen": (jnp.sum(rewards * good), good.sum()),
            "rewards/rejected": (jnp.sum(rewards * bad), bad.sum()),
        }
        return Terms(jnp.sum(losses * live), live.sum(), metrics)


def other_divergence(policy: LogProbs, reference: LogProbs, batch: Batch) -> Terms:
    """The policy's divergence from the reference on answers to other prompts, as a loss: the batch's mean is KTO's z0 before it
    is cut at 0. A window's z0 needs all of its micro-batches, so it is computed before the step that uses it."""
    mask = batch["other_mask"]
    ratios = answer_logps(policy, batch["other"], mask) - answer_logps(reference, batch["other"], mask)
    live = live_rows(mask)
    return Terms(jnp.sum(ratios * live), live.sum(), {})


def with_kl(window: Mapping[str, np.ndarray], divergence: float) -> dict[str, np.ndarray]:
    """A window `[M, B, ...]` with KTO's z0 in the place of what it is estimated on."""
    kept = {name: array for name, array in window.items() if name not in ("other", "other_mask")}
    return {**kept, "kl": np.full(window["mask"].shape[:2], max(divergence, 0.0), np.float32)}


def answer_logps(model: LogProbs, tokens: Array, mask: Array) -> Array:
    """Log-probabilities float32 `[B]` of whole answers: sums over the tokens that `mask` `[B, T]` selects."""
    return jnp.sum(model(tokens, wanted=mask) * mask, axis=1)


def live_rows(mask: Array) -> Array:
    """float32 `[B]`: 0 for the rows that only fill a batch."""
    return (mask.sum(axis=1) > 0).astype(jnp.float32)
