"""Losses that learn from a better and a worse answer. Pure functions of log-probabilities, float32; they know no model and no batch.

Letters in shapes: P pairs, N answers. Every loss is one number for each pair or answer, so that a mean over a batch is the same however
the batch was cut into micro-batches.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Answers(NamedTuple):
    """One answer to each of P prompts: `logps` and `ref_logps` `[P]` are log-probabilities of whole answers (sums over their tokens)
    under the policy and under the reference, `tokens` `[P]` is how many tokens each has."""

    logps: Array
    ref_logps: Array
    tokens: Array

    @property
    def ratios(self) -> Array:
        """log pi(y|x) - log pi_ref(y|x), `[P]`: the implicit reward of DPO before beta."""
        return self.logps - self.ref_logps

    @property
    def means(self) -> Array:
        """The policy's log-probability of a token, averaged over the answer, `[P]`."""
        return self.logps / jnp.maximum(self.tokens, 1)


# pairwise(chosen, rejected, beta, label smoothing) -> loss of each pair `[P]`
Pairwise = Callable[[Answers, Answers, float, float], Array]


def sigmoid(chosen: Answers, rejected: Answers, beta: float, label_smoothing: float = 0.0) -> Array:
    """DPO (Rafailov et al. 2023, equation 7). `label_smoothing` is the share of labels that are taken to be flipped (conservative DPO,
    Mitchell 2023)."""
    margin = beta * (chosen.ratios - rejected.ratios)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def robust(chosen: Answers, rejected: Answers, beta: float, label_smoothing: float = 0.0) -> Array:
    """DPO whose expectation under labels flipped with probability `label_smoothing` < 0.5 is the loss under clean ones (Chowdhury et al.
    2024, equation 12)."""
    margin = beta * (chosen.ratios - rejected.ratios)
    clean, flipped = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(chosen: Answers, rejected: Answers, beta: float, label_smoothing: float = 0.0) -> Array:
    """The hinge loss on DPO's margin (SLiC, Zhao et al. 2023; RSO, Liu et al. 2023). Has no label smoothing."""
    return jax.nn.relu(1 - beta * (chosen.ratios - rejected.ratios))


def ipo(chosen: Answers, rejected: Answers, beta: float, label_smoothing: float = 0.0) -> Array:
    """IPO (Azar et al. 2023, equation 17) with `beta` for the paper's tau, on log-ratios averaged over tokens, as its authors run it.
    Has no label smoothing."""
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


def kto(answers: Answers, desirable: Array, kl: Array, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Array:
    """KTO (Ethayarajh et al. 2024, equation 7) without its constant: the loss of each of N answers.

    Arguments:
        desirable: bool `[N]`.
        kl: scalar of `kl_baseline`, without a gradient.
    """
    gain = beta * (answers.ratios - kl)
    return jnp.where(desirable, desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain))


def kl_baseline(mismatched: Answers, live: Array) -> Array:
    """KTO's z0, a scalar without a gradient: the divergence from the reference, estimated on answers to other prompts, at least 0.

    Arguments:
        live: float or bool `[N]`, 0 where a row is filling.
    """
    mean = jnp.sum(mismatched.ratios * live) / jnp.maximum(jnp.sum(live), 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0))


def log_odds(log_probability: Array) -> Array:
    """log(p / (1 - p)) from log p <= 0. Finite, with a finite gradient, also where p has rounded to 1."""
    log_probability = jnp.minimum(log_probability, -jnp.finfo(jnp.float32).eps)
    # Each branch loses its digits where the other is taken (Maechler 2012); the inner `where` keeps NaN out of its gradient.
    likely = log_probability > -0.6931472
    near_one = jnp.log(-jnp.expm1(jnp.where(likely, log_probability, -0.5)))
    far = jnp.log1p(-jnp.exp(jnp.where(likely, -1.0, log_probability)))
    return log_probability - jnp.where(likely, near_one, far)


def pair_metrics(chosen: Answers, rejected: Answers, beta: float) -> dict[str, Array]:
    """What is worth seeing of each pair, `[P]` each, under TRL's names: implicit rewards, their margin, and how often it is positive."""
    chosen_rewards, rejected_rewards = beta * chosen.ratios, beta * rejected.ratios
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).astype(jnp.float32),
        "logps/chosen": chosen.logps,
        "logps/rejected": rejected.logps,
    }
