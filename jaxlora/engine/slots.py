"""The rows that generate: what each slot of the engine is doing, and the host side of its next step."""

import dataclasses
import math
import threading
from collections.abc import Sequence as Tokens

import numpy as np

from jaxlora.engine.batch import Batch, idle_batch, idle_prefill_batch
from jaxlora.engine.lookup import Lookup
from jaxlora.engine.requests import MAX_BANNED, Request, Result, Timings, Token
from jaxlora.engine.sampling import Sampled


@dataclasses.dataclass(eq=False)
class Sequence:
    """One request inside the engine. `written` counts the tokens whose keys and values are in the cache, `cached` those that
    were there before it came, `part` those of its prompt that the coming step reads, `handed_out` those of the answer that its sink has
    got: more than `answer` holds, while a sequence that had to begin anew repeats itself. A `suspect` took part in a step that failed;
    `guessed` are the tokens that its next step has beside the last one; what has `ended` takes no more."""

    request: Request
    submitted: float
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)
    started: float = math.nan
    first_token: float = math.nan
    slot: int = -1
    bank_slot: int = -1
    written: int = 0
    cached: int = 0
    part: int = 0
    answer: list[int] = dataclasses.field(default_factory=list)
    handed_out: int = 0
    suspect: bool = False
    ended: bool = False
    guessed: list[int] = dataclasses.field(default_factory=list)
    lookup: Lookup | None = None

    @property
    def prefilling(self) -> bool:
        return self.written < len(self.request.prompt)

    @property
    def left(self) -> int:
        """How many tokens of its prompt no step has read, nor is to read."""
        return max(0, len(self.request.prompt) - self.written - self.part)

    def begin_anew(self, suspect: bool) -> None:
        """Back to the beginning of the prompt, since the cache was lost; a `suspect` took part in the step that lost it."""
        self.suspect = suspect or self.suspect
        self.written = self.cached = self.part = 0
        self.answer.clear()
        self.guessed, self.lookup = [], None

    def guess(self, most: int, max_seq_len: int) -> bool:
        """Guesses up to so many of the next tokens, no more than it may have. False for a sequence whose next token is not simply the
        likeliest one: it takes no part in steps with guesses."""
        params, prompt = self.request.params, self.request.prompt
        self.guessed = []
        if params.temperature > 0 or params.penalised or params.logprobs is not None or params.bad_words or self.banned():
            return False
        room = self.room(max_seq_len) - 1  # the last token that it may have needs no step after it
        if room > 0:
            self.lookup = self.lookup or Lookup(prompt)
            self.guessed = self.lookup.guess(self.answer, min(most, room))
        return True

    def room(self, max_seq_len: int) -> int:
        """How many tokens its answer may still have."""
        return min(self.request.params.max_tokens, max_seq_len - len(self.request.prompt)) - len(self.answer)

    def steps(self, most: int, max_seq_len: int) -> int:
        """How many tokens, up to so many, the device may generate by itself: what must not come next is for the host to say."""
        return 1 if self.request.params.bad_words or self.banned() else min(most, self.room(max_seq_len))

    def next_tokens(self) -> Tokens[int]:
        """What the next step has of it: the part of its prompt, or the last token of its answer."""
        return self.request.prompt[self.written : self.written + self.part] if self.part else self.answer[-1:]

    def deadline(self, queue_timeout_s: float) -> float:
        """When it has waited too long, in seconds of `time.monotonic`: for a slot, or as its own time-out says."""
        own = math.inf if self.request.timeout_s is None else self.submitted + self.request.timeout_s
        return own if self.slot >= 0 else min(own, self.submitted + queue_timeout_s)

    def banned(self) -> list[int]:
        """Token ids that must not come next: stop tokens before `min_tokens`, and the ends of bad words."""
        params = self.request.params
        banned = [word[-1] for word in params.bad_words if len(word) == 1 or self._ends_with(word[:-1])]
        if len(self.answer) < params.min_tokens:
            banned += params.stop_token_ids
        return banned[:MAX_BANNED]

    def _ends_with(self, ids: tuple[int, ...]) -> bool:
        # A bad word may begin in the prompt only if it ends in the answer, so looking at the tail of both is right.
        tail = [*self.request.prompt[-len(ids) :], *self.answer][-len(ids) :] if len(self.answer) < len(ids) else self.answer[-len(ids) :]
        return tuple(tail) == ids

    def result(self, reason: str, now: float) -> Result:
        """The end of its answer."""
        timings = Timings(self.submitted, self.started, self.first_token, now)
        return Result(reason, len(self.request.prompt), len(self.answer), self.cached, timings)


def prefill_batch(sequences: list[Sequence], rows: int, length: int, vocab: int) -> Batch:
    """The parts of prompts, then the last token of each other sequence, in a step of so many rows and tokens."""
    batch, tokens = idle_prefill_batch(rows, length, vocab), []
    for row, sequence in enumerate(sequences):
        batch.offsets[row] = len(tokens)
        tokens += sequence.next_tokens()
        _fill(batch, row, sequence, max(1, sequence.part))
        batch.reads[row], batch.emit[row] = sequence.part > 0, not sequence.left
    batch.tokens[:] = np.pad(tokens, (0, batch.tokens.size - len(tokens))).reshape(batch.tokens.shape)
    return batch


def decode_batch(sequences: list[Sequence], rows: list[int], size: int, steps: int, vocab: int) -> Batch:
    """The last token of each sequence, in its row of `size` rows, for so many that follow."""
    batch = idle_batch(size, 1, vocab)
    for sequence, row in zip(sequences, rows, strict=True):
        batch.tokens[row, 0] = sequence.next_tokens()[0]
        _fill(batch, row, sequence, 1)
        batch.emit[row] = steps
    return batch


def guess_batch(sequences: list[Sequence], size: int, guesses: int, vocab: int) -> Batch:
    """The last token of each sequence with what it `guessed`, in `size` rows."""
    batch = idle_batch(size, 1 + guesses, vocab, guessed=True)
    for row, sequence in enumerate(sequences):
        tokens = [*sequence.next_tokens(), *sequence.guessed]
        batch.tokens[row, : len(tokens)] = tokens
        _fill(batch, row, sequence, len(tokens))
        batch.emit[row] = len(tokens)
    return batch


def _fill(batch: Batch, row: int, sequence: Sequence, length: int) -> None:
    params, sampler = sequence.request.params, batch.sampler
    batch.slots[row], batch.adapters[row] = sequence.slot, sequence.bank_slot
    batch.starts[row], batch.lengths[row] = sequence.written, length
    sampler.temperature[row], sampler.top_k[row] = params.temperature, params.top_k
    sampler.top_p[row], sampler.min_p[row] = params.top_p, params.min_p
    sampler.repetition[row] = params.repetition_penalty
    sampler.frequency[row], sampler.presence[row] = params.frequency_penalty, params.presence_penalty
    sampler.key[row] = params.seed >> 32, params.seed & 0xFFFFFFFF
    sampler.logprobs[row] = params.logprobs is not None
    banned = sequence.banned()
    sampler.banned[row, : len(banned)] = banned


def token_of(sampled: Sampled, row: int, index: int, params_logprobs: int | None) -> Token:
    """One of the sampled tokens of one row, with the log-probabilities that were asked for."""
    id = int(sampled.tokens[row, index])
    if params_logprobs is None:
        return Token(id, math.nan)
    top = zip(sampled.top_ids[row, index, :params_logprobs].tolist(), sampled.top_logprobs[row, index, :params_logprobs].tolist())
    return Token(id, float(sampled.logprobs[row, index]), tuple(top))


def row_numbers(sequences: list[Sequence], by_slot: bool) -> list[int]:
    """The row of each sequence in a decode batch. `by_slot`: row b is slot b, as a backend with one batch size wants it."""
    return [sequence.slot if by_slot else index for index, sequence in enumerate(sequences)]
