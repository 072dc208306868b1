"""Log-probabilities of given tokens under a frozen output layer, in plain JAX. Logits never lie in memory for more than a block of tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlora.weights import Dense

BLOCK = 256  # tokens whose logits are computed at the same time


def target_log_probs(head: Dense, hidden: Array, targets: Array, temperature: Array) -> Array:
    """float32 `[N]`: log-softmax of `head(hidden) / temperature` at the targets; 0 where a target is -1.

    The head is frozen, so a token's gradient with respect to its hidden state is one vector, computed together with the logits: a
    block of logits is made once and thrown away. Blocks without any target are skipped, for which tokens with a target are sorted
    to the front.

    Arguments:
        head: `[..., D] -> [..., V]`, a `jaxlora.weights.Dense`.
        hidden: `[N, D]`.
        targets: int32 `[N]`.
    """
    count = hidden.shape[0]
    order = jnp.argsort(targets < 0, stable=True)
    block = min(BLOCK, count)
    filling = -count % block
    sorted_hidden = jnp.pad(hidden[order], ((0, filling), (0, 0)))
    sorted_targets = jnp.pad(targets[order], (0, filling), constant_values=-1)
    found = _blocks(head, sorted_hidden.reshape(-1, block, hidden.shape[1]), sorted_targets.reshape(-1, block), temperature)
    return jnp.zeros(count, jnp.float32).at[order].set(found.reshape(-1)[:count])


@jax.custom_vjp
def _blocks(head: Dense, hidden: Array, targets: Array, temperature: Array) -> Array:
    """hidden `[K, block, D]`, targets `[K, block]` -> `[K, block]`."""

    def block(hidden: Array, targets: Array) -> Array:
        return jnp.where(targets < 0, 0.0, of_targets(head(hidden).astype(jnp.float32) / temperature, targets))

    return _map_blocks(block, hidden, targets, lambda: jnp.zeros(targets.shape[1], jnp.float32))


def _blocks_forward(head: Dense, hidden: Array, targets: Array, temperature: Array) -> tuple[Array, tuple[Any, ...]]:
    def block(hidden: Array, targets: Array) -> tuple[Array, Array]:
        logits = head(hidden).astype(jnp.float32) / temperature
        found = of_targets(logits, targets)
        # d log p(target) / d logits = onehot(target) - softmax
        slope = jax.nn.one_hot(targets, logits.shape[1]) - jax.nn.softmax(logits)
        slope = jnp.where((targets < 0)[:, None], 0.0, slope).astype(hidden.dtype)
        along = head.transposed(slope) / temperature
        return jnp.where(targets < 0, 0.0, found), along

    size, width = targets.shape[1], hidden.shape[2]
    found, along = _map_blocks(
        block, hidden, targets, lambda: (jnp.zeros(size, jnp.float32), jnp.zeros((size, width), jnp.float32))
    )
    return found, (along, jnp.zeros((), hidden.dtype))


def _blocks_backward(kept: tuple[Any, ...], slope: Array) -> tuple[Any, ...]:
    along, like = kept
    return None, (slope[..., None] * along).astype(like.dtype), None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _map_blocks(block: Any, hidden: Array, targets: Array, nothing: Any) -> Any:
    def run(_: None, inputs: tuple[Array, Array]) -> tuple[None, Any]:
        return None, jax.lax.cond(jnp.any(inputs[1] >= 0), block, lambda *_: nothing(), *inputs)

    return jax.lax.scan(run, None, (hidden, targets))[1]


def of_targets(logits: Array, targets: Array) -> Array:
    """log-softmax of `[N, V]` at the targets `[N]`; -1 gives a number without meaning."""
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    return picked - jax.nn.logsumexp(logits, axis=1)
