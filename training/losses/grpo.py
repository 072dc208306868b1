"""Group-relative policy optimisation (Shao et al. 2024, DeepSeekMath): advantages from the rewards of a group, and the clipped
loss.

The advantages are computed on the host, in NumPy; the loss is one as `training.losses` defines them. Neither knows where
answers and rewards come from. Letters in shapes: P prompts, G answers of each, B answers of a batch, T tokens.

A batch has `tokens` int32 `[B, T]` (prompt and answer), `mask` `[B, T]`, `advantages` float32 `[B]`, and `old_logps` float32
`[B, T]`: the log-probabilities under the policy that sampled the answers. Without `old_logps` that policy is the one being
trained, as it is.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from training.losses import Batch, LogProbs, Terms

NORMALISATIONS = ("grpo", "dapo", "dr_grpo")
SCALES = ("group", "batch", "none")
_EPSILON = 1e-4  # keeps a group of nearly equal rewards from being blown up; TRL's value


@dataclasses.dataclass(frozen=True)
class GrpoLoss:
    """The clipped loss (DeepSeekMath, equation 3, negated), with the k3 estimate of the divergence from the reference (equation
    4).

    Metrics, by token: `kl`, and the shares `clip/low` and `clip/high` of tokens whose gradient the clipping takes away.

    Attributes:
        normalisation: `grpo`: the mean over answers of their means over tokens; `dapo`: the mean over all tokens (Yu et al.
            2025); `dr_grpo`: the sum over tokens by a constant, `max_completion`, so that length has no influence (Liu et al.
            2025).
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        kl: weight of the divergence from the reference; 0 needs no reference.
        max_completion: most tokens of an answer.
        temperature: at which the answers were sampled; the policy that is improved is the one that was sampled from.
    """

    normalisation: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0
    max_completion: int = 256
    temperature: float = 1.0

    def __call__(self, policy: LogProbs, reference: LogProbs, batch: Batch) -> Terms:
        mask = batch["mask"].astype(jnp.float32)
        logps = policy(batch["tokens"], temperature=self.temperature, wanted=mask)
        old_logps = batch["old_logps"] if "old_logps" in batch else jax.lax.stop_gradient(logps)
        gain = batch["advantages"][:, None]
        # Where the mask is 0 the log-probabilities mean nothing, and an overflow there would make NaN of the whole sum.
        ratio = jnp.exp(jnp.where(mask > 0, logps - old_logps, 0.0))
        clipped = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        loss = -jnp.minimum(ratio * gain, clipped * gain)
        tokens = mask.sum(axis=1)
        metrics = {
            "clip/low": (jnp.sum(((ratio < 1 - self.clip_low) & (gain < 0)) * mask), tokens.sum()),
            "clip/high": (jnp.sum(((ratio > 1 + self.clip_high) & (gain > 0)) * mask), tokens.sum()),
        }
        if self.kl:
            ref_logps = reference(batch["tokens"], temperature=self.temperature, wanted=mask)
            off = jnp.where(mask > 0, ref_logps - logps, 0.0)
            divergence = jnp.exp(off) - off - 1
            loss = loss + self.kl * divergence
            metrics["kl"] = (jnp.sum(divergence * mask), tokens.sum())
        return Terms(*self._normalise(loss * mask, tokens), metrics)

    def _normalise(self, loss: Array, tokens: Array) -> tuple[Array, Array]:
        answers = jnp.sum(tokens > 0).astype(jnp.float32)
        if self.normalisation == "grpo":
            return jnp.sum(jnp.sum(loss, axis=1) / jnp.maximum(tokens, 1)), answers
        if self.normalisation == "dapo":
            return jnp.sum(loss), tokens.sum()
        if self.normalisation == "dr_grpo":
            return jnp.sum(loss), answers * self.max_completion
        raise ValueError(f"{self.normalisation!r} is none of {', '.join(NORMALISATIONS)}")


def advantages(rewards: np.ndarray, scale: str = "group") -> np.ndarray:
    """Group-relative advantages, float32 `[P, G]`, from rewards `[P, G]`; NaN marks an answer without a reward.

    Arguments:
        scale: `group` divides by the standard deviation of the group, `batch` by that of all rewards, `none` by nothing, as
            `dr_grpo` has it. Standard deviations are those of a sample (G - 1), as in TRL.

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
