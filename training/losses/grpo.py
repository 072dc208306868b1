"""Group-relative policy optimisation (Shao et al. 2024, DeepSeekMath): advantages from the rewards of a group, and the clipped loss.

Pure functions: the advantages on the host, in NumPy; the loss of log-probabilities, in JAX. They know no model and no reward.
Letters in shapes: P prompts, G answers of each, N = P * G answers, T tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NORMALISATIONS = ("grpo", "dapo", "dr_grpo")
SCALES = ("group", "batch", "none")
_EPSILON = 1e-4  # keeps a group of nearly equal rewards from being blown up; TRL's value


@dataclasses.dataclass(frozen=True)
class Objective:
    """What of GRPO can be chosen.

    Attributes:
        normalisation: `grpo`: the mean over answers of their means over tokens; `dapo`: the mean over all tokens (Yu et al. 2025);
            `dr_grpo`: the sum over tokens by a constant, `max_completion`, so that length has no influence (Liu et al. 2025).
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        kl: weight of the divergence from the reference; 0 needs no reference.
        max_completion: most tokens of an answer.
    """

    normalisation: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0
    max_completion: int = 256


def advantages(rewards: np.ndarray, scale: str = "group") -> np.ndarray:
    """Group-relative advantages, float32 `[P, G]`, from rewards `[P, G]`; NaN marks an answer without a reward.

    Arguments:
        scale: `group` divides by the standard deviation of the group, `batch` by that of all rewards, `none` by nothing, as `dr_grpo`
            has it. Standard deviations are those of a sample (G - 1), as in TRL.

    Returns:
        Zero for answers without a reward, which take no part in the means either, and for groups in which only one has a reward.
    """
    rewards = np.asarray(rewards, np.float64)
    known = ~np.isnan(rewards)
    filled = np.where(known, rewards, 0.0)
    count = known.sum(axis=1, keepdims=True)
    centred = np.where(known, filled - filled.sum(axis=1, keepdims=True) / np.maximum(count, 1), 0.0)
    if scale == "group":
        centred = centred / (np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1)) + _EPSILON)
    elif scale == "batch":
        everything = rewards[known]
        centred = centred / ((everything.std(ddof=1) if everything.size > 1 else 0.0) + _EPSILON)
    elif scale != "none":
        raise ValueError(f"{scale!r} is none of {', '.join(SCALES)}")
    return centred.astype(np.float32)


def policy_loss(
    objective: Objective, logps: Array, old_logps: Array, advantages: Array, mask: Array, ref_logps: Array | None = None
) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
    """The clipped loss (DeepSeekMath, equation 3, negated), with the k3 estimate of the divergence (equation 4).

    Arguments:
        logps: float32 `[N, T]` of the answers' tokens under the policy that is trained.
        old_logps: the same under the policy that sampled them, without a gradient.
        advantages: float32 `[N]`.
        mask: `[N, T]`, 1 on the tokens of an answer. A row without any counts for nothing.
        ref_logps: float32 `[N, T]` under the reference; needed where `objective.kl` is not 0.

    Returns:
        (sum, denominator, metrics): the loss is sum / denominator. Metrics are (sum, denominator) too: `kl`, `clip/low`, `clip/high`
        by token.
    """
    mask = mask.astype(jnp.float32)
    gain = advantages[:, None]
    # Where the mask is 0 the log-probabilities mean nothing, and an overflow there would make NaN of the whole sum.
    ratio = jnp.exp(jnp.where(mask > 0, logps - old_logps, 0.0))
    clipped = jnp.clip(ratio, 1 - objective.clip_low, 1 + objective.clip_high)
    loss = -jnp.minimum(ratio * gain, clipped * gain)
    tokens = mask.sum(axis=1)
    total = tokens.sum()
    metrics = {
        "clip/low": (jnp.sum(((ratio < 1 - objective.clip_low) & (gain < 0)) * mask), total),
        "clip/high": (jnp.sum(((ratio > 1 + objective.clip_high) & (gain > 0)) * mask), total),
    }
    if objective.kl:
        if ref_logps is None:
            raise ValueError("the divergence from the reference needs the reference's log-probabilities")
        off = jnp.where(mask > 0, ref_logps - logps, 0.0)
        divergence = jnp.exp(off) - off - 1
        loss = loss + objective.kl * divergence
        metrics["kl"] = (jax.lax.stop_gradient(jnp.sum(divergence * mask)), total)
    answers = jnp.sum(tokens > 0).astype(jnp.float32)
    if objective.normalisation == "grpo":
        return jnp.sum(jnp.sum(loss * mask, axis=1) / jnp.maximum(tokens, 1)), answers, metrics
    if objective.normalisation == "dapo":
        return jnp.sum(loss * mask), total, metrics
    if objective.normalisation == "dr_grpo":
        return jnp.sum(loss * mask), answers * objective.max_completion, metrics
    raise ValueError(f"{objective.normalisation!r} is none of {', '.join(NORMALISATIONS)}")
