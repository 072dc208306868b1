"""The rows of one step. They go to the device as one array, and the results come back as one, since each array costs time of its own."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxlora.engine.requests import MAX_BANNED
from jaxlora.engine.sampling import SamplerRows

# How a row of the array begins, in values of 4 bytes. Its tokens follow.
_ROW = {name: (np.int32, 1) for name in ("slots", "starts", "lengths", "offsets", "reads", "adapters", "emit")}
_SAMPLER = {
    "temperature": (np.float32, 1), "top_k": (np.int32, 1), "top_p": (np.float32, 1), "min_p": (np.float32, 1),
    "repetition": (np.float32, 1), "frequency": (np.float32, 1), "presence": (np.float32, 1), "key": (np.uint32, 2),
    "banned": (np.int32, MAX_BANNED), "logprobs": (np.int32, 1),
}  # fmt: skip
_HEAD = sum(width for _, width in (*_ROW.values(), *_SAMPLER.values()))


@dataclasses.dataclass
class Fields:
    """What the rows of a step are: NumPy arrays on the host, JAX arrays in the step. `tokens` int32 `[B, T]`; `slots`, `starts`, `lengths`,
    `offsets` int32 `[B]` as in `kv_cache.Rows`; `reads` int32 `[B]` is 1 where a row's tokens belong to a prompt, and those rows come first;
    `adapters` int32 `[B]`; `emit` int32 `[B]` says how many tokens a row gets: 0 before the end of a prompt, otherwise 1, in a decode step
    any number, the same for all rows that have one, and in a step with guesses one for each position."""

    slots: Any
    starts: Any
    lengths: Any
    offsets: Any
    reads: Any
    adapters: Any
    emit: Any
    sampler: SamplerRows
    tokens: Any


@dataclasses.dataclass
class Batch(Fields):
    """The rows of one step on the host: views of parts of `packed`, int32 `[B, N]`. `guessed`: the tokens of a row after its first are
    guesses, so a token is chosen at every position; greedily, and the history stays as it is. `prefill`: how many tokens a step has that
    reads prompts, and whose rows have any number of them: they lie one behind the other in `tokens`, whatever row that is. 0 for other steps."""

    packed: np.ndarray
    guessed: bool
    prefill: int

    @property
    def steps(self) -> int:
        """How many steps a call with it runs."""
        return 1 if self.guessed else max(1, int(self.emit.max()))


def idle_batch(rows: int, length: int, vocab: int, guessed: bool = False) -> Batch:
    """A batch whose rows do nothing: the start from which a real one is filled in."""
    packed = np.repeat(_idle_row(length, vocab), rows, axis=0)
    fields = _take_apart(packed, np.ndarray.view)
    fields.slots[:] = np.arange(rows)
    fields.offsets[:] = np.arange(rows) * length
    return Batch(**vars(fields), packed=packed, guessed=guessed, prefill=0)


def idle_prefill_batch(rows: int, tokens: int, vocab: int) -> Batch:
    """The same for a step of so many tokens that reads prompts."""
    batch = idle_batch(rows, -(-tokens // rows), vocab)
    batch.prefill, batch.offsets[1:] = tokens, tokens
    return batch


@functools.cache
def _idle_row(length: int, vocab: int) -> np.ndarray:
    """`[1, N]`, with neutral settings of a greedy sampler."""
    packed = np.zeros((1, _HEAD + length), np.int32)
    fields = _take_apart(packed, np.ndarray.view)
    fields.adapters[:] = -1
    fields.sampler.top_p[:] = fields.sampler.repetition[:] = 1
    fields.sampler.banned[:] = vocab
    return packed


def in_step(packed: Array) -> Fields:
    """The rows of `Batch.packed`, in a step."""
    return _take_apart(packed, jax.lax.bitcast_convert_type)


def _take_apart(packed: Any, view: Callable[[Any, Any], Any]) -> Fields:
    at = 0

    def parts(table: dict[str, tuple[Any, int]]) -> dict[str, Any]:
        nonlocal at
        found = {}
        for name, (dtype, width) in table.items():
            found[name] = view(packed[:, at] if width == 1 else packed[:, at : at + width], dtype)
            at += width
        return found

    return Fields(**parts(_ROW), sampler=SamplerRows(**parts(_SAMPLER)), tokens=packed[:, _HEAD:])
