"""Supervised fine-tuning: cross-entropy of the tokens that the mask marks."""

import jax.numpy as jnp

from training.losses import Batch, LogProbs, Terms


def sft(policy: LogProbs, reference: LogProbs, batch: Batch) -> Terms:
    """Summed negative log-likelihood in nats over the learned tokens; the count is their number.

    Batch: `tokens` int32 `[B, T]`, `mask` `[B, T]`, and `segments` int32 `[B, T]` where examples are packed.
    """
    mask = batch["mask"].astype(jnp.float32)
    total = -jnp.sum(policy(batch["tokens"], batch.get("segments"), wanted=mask) * mask)
    return Terms(total, jnp.sum(mask), {})
