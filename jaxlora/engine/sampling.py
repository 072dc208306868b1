"""Choosing the next token of every row, on the device. Pure functions.

A row's choice depends on its own logits, settings, seed and position only: every step below is computed row by row, so neither the other
rows of a batch nor the batch size can change it. Letters in shapes: B rows, V vocabulary, S slots.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxlora.backend import Backend

TOP = 20
WIDTH = 3 + 2 * TOP  # values of a row that `pack` gives, with its probabilities


@struct.dataclass
class SamplerRows:
    """Sampling settings of a step's rows; all arrays are `[B]` but `key` uint32 `[B, 2]` (the seed's high and low word) and `banned`
    int32 `[B, N]` (ids that must not come next, padded with V)."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition: Array
    frequency: Array
    presence: Array
    key: Array
    banned: Array
    logprobs: Array


@struct.dataclass
class Sampled:
    """`tokens`, `logprobs` `[B]` and the best `top_ids`, `top_logprobs` `[B, TOP]` (zeros where no row asked); `ok` is False for a row
    whose logits are not finite. On the host a second axis counts the tokens that a row got in a step; there are no probabilities after a
    step with guesses."""

    tokens: Array
    logprobs: Array | None
    top_ids: Array | None
    top_logprobs: Array | None
    ok: Array


def pack(sampled: Sampled) -> Array:
    """All of it in one array, int32 `[..., N]`."""
    ok, parts = sampled.ok.astype(jnp.int32), (sampled.tokens, sampled.logprobs, sampled.top_ids, sampled.top_logprobs)
    columns = [part.reshape(*ok.shape, -1) for part in (ok, *parts) if part is not None]
    return jnp.concatenate([jax.lax.bitcast_convert_type(part, jnp.int32) for part in columns], axis=-1)


def unpack(packed: np.ndarray) -> Sampled:
    """What `pack` was given, on the host."""
    ok, tokens, rest = packed[..., 0] != 0, packed[..., 1], packed[..., 2:]
    if not rest.shape[-1]:
        return Sampled(tokens, None, None, None, ok)
    return Sampled(tokens, rest[..., 0].view(np.float32), rest[..., 1 : 1 + TOP], rest[..., 1 + TOP :].view(np.float32), ok)


@struct.dataclass
class History:
    """What each slot has seen, for the penalties: `prompt` bool and `answer` int32 (counts), both `[S, V]`."""

    prompt: Array
    answer: Array

    @classmethod
    def empty(cls, slots: int, vocab: int) -> "History":
        return cls(jnp.zeros((slots, vocab), bool), jnp.zeros((slots, vocab), jnp.int32))


def record_prompt(history: History, count: Array, slots: Array, tokens: Array, starts: Array, lengths: Array, offsets: Array) -> History:
    """The history with parts of prompts added, those of the first `count` rows. Row b has `lengths[b]` of `tokens`, int32 `[N]`, from number
    `offsets[b]` on; what starts at position 0 begins a new request in its slot."""
    vocab, numbers = history.prompt.shape[1], jnp.arange(len(tokens))

    def add(row: Array, history: History) -> History:
        prompt, answer = history.prompt, history.answer
        slot, fresh = slots[row], starts[row] == 0
        old_prompt = jax.lax.dynamic_slice_in_dim(prompt, slot, 1)
        old_answer = jax.lax.dynamic_slice_in_dim(answer, slot, 1)
        own = (numbers >= offsets[row]) & (numbers < offsets[row] + lengths[row])
        new_prompt = (old_prompt & ~fresh).at[0, jnp.where(own, tokens, vocab)].set(True, mode="drop")
        prompt = jax.lax.dynamic_update_slice_in_dim(prompt, new_prompt, slot, axis=0)
        answer = jax.lax.dynamic_update_slice_in_dim(answer, jnp.where(fresh, 0, old_answer), slot, axis=0)
        return History(prompt, answer)

    return jax.lax.fori_loop(0, count, add, history)


def record_answer(history: History, slots: Array, tokens: Array, live: Array) -> History:
    """The history with one generated token `[B]` added for each live row."""
    vocab = history.answer.shape[1]
    answer = history.answer.at[slots, jnp.where(live, tokens, vocab)].add(1, mode="drop")
    return History(history.prompt, answer)


@functools.partial(jax.jit, static_argnames="backend")  # so that Python traces it once for all steps of as many rows
def sample(logits: Array, rows: SamplerRows, positions: Array, history: History, slots: Array, backend: Backend) -> Sampled:
    """The next token of every row from `logits` float32 `[B, V]`; `positions` int32 `[B]` is where that token will stand.

    Log-probabilities are those of the model itself, before penalties, temperature and filters. A batch in which nobody asks for any of
    these pays for none of them, and its rows come out as they would beside ones that do.
    """
    batch, vocab = logits.shape
    best, total = backend.argmax_logsumexp(logits)
    penalised = jnp.any((rows.repetition != 1) | (rows.frequency != 0) | (rows.presence != 0))
    warm = rows.temperature > 0

    def shaped() -> Array:
        shaped = jax.lax.cond(penalised, lambda: _penalise(logits, rows, history, slots), lambda: logits)
        shaped = shaped.at[jnp.arange(batch)[:, None], rows.banned].set(-jnp.inf, mode="drop")
        best, _ = backend.argmax_logsumexp(shaped)

        def drawn() -> Array:
            return backend.draw(shaped, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.key, positions)

        return jax.lax.cond(jnp.any(warm), lambda: jnp.where(warm, drawn(), best), lambda: best)

    tokens = jax.lax.cond(penalised | jnp.any(warm) | jnp.any(rows.banned < vocab), shaped, lambda: best)
    nothing = (jnp.zeros(batch), jnp.zeros((batch, TOP), jnp.int32), jnp.zeros((batch, TOP)))
    logprobs = jax.lax.cond(jnp.any(rows.logprobs), lambda: _logprobs(logits, total, tokens), lambda: nothing)
    return Sampled(tokens, *logprobs, jnp.isfinite(total))


def _penalise(logits: Array, rows: SamplerRows, history: History, slots: Array) -> Array:
    prompt, answer = history.prompt[slots], history.answer[slots]
    repetition = rows.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(prompt | (answer > 0), repeated, logits)
    return logits - rows.frequency[:, None] * answer - rows.presence[:, None] * (answer > 0)


def _logprobs(logits: Array, total: Array, tokens: Array) -> tuple[Array, Array, Array]:
    top = min(TOP, logits.shape[1])
    values, ids = jax.lax.top_k(logits, top)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - total
    pad = ((0, 0), (0, TOP - top))
    return chosen, jnp.pad(ids.astype(jnp.int32), pad), jnp.pad(values - total[:, None], pad, constant_values=-jnp.inf)
