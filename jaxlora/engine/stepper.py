"""Runs steps so that a fault ends only the requests that cause it.

A step that raises is tried again in parts, prompts apart from answers and then in halves, until it is known for which sequence alone it
fails twice. Where the fault took the state along, which a step updates in place, the state begins anew, and so does every sequence that
runs: since a request determines its tokens, those that were handed out already come again and are not handed out twice. Those of the
failed step then run one by one, until they are past it. A step of idle rows that fails as well shows that no request is to blame.
"""

import dataclasses
import functools
import gc
import logging
import time
from collections.abc import Callable, Iterator

import numpy as np

from jaxlora.engine.batch import Batch, idle_batch
from jaxlora.engine.health import Health
from jaxlora.engine.program import Program
from jaxlora.engine.sampling import Sampled
from jaxlora.engine.slots import Sequence, decode_batch, guess_batch, prefill_batch, row_numbers
from jaxlora.errors import EngineError, ServingError, Unavailable

log = logging.getLogger(__name__)

# How long one call may take in which several decode steps run: whoever comes meanwhile waits for its end, as for that of a prefill step.
_CALL_S = 0.08


class Broken(Exception):
    """Steps fail whoever takes part in them: the engine can't go on."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a step gave a sequence: `length` more tokens in the cache and a token of a row of `sampled`, or the error that ends it."""

    sequence: Sequence
    length: int = 0
    sampled: Sampled | None = None
    row: int = 0
    index: int = 0
    error: ServingError | None = None


# The batch of some sequences, with the row that each of them has in it.
_BatchOf = Callable[[list[Sequence]], tuple[Batch, list[int]]]


class Stepper:
    """Steps of one `Program`.

    Arguments:
        begin_anew: has every sequence that runs begin anew, since the state is lost; told of those that took part in the step that lost it.
        relieve: gives memory back that can be done without.
    """

    def __init__(self, program: Program, health: Health, begin_anew: Callable[[list[Sequence]], None], relieve: Callable[[], None]):
        self._program, self._health, self._begin_anew, self._relieve = program, health, begin_anew, relieve
        self._by_slot = len(program.batch_sizes) == 1
        self._resets = 0
        self._step_s = 0.0  # what a decode step took in the last call
        self.steps = self.guessed = self.guessed_right = 0

    def run(self, sequences: list[Sequence], expected: bool = False) -> Iterator[Outcome]:
        """The `part` of each sequence's prompt, or its next token, in one call if all is well. Where nobody has a part, it may be several
        tokens, which were guessed, or between which the host has nothing to say. An outcome has to be dealt with before the next one is
        asked for.

        Arguments:
            sequences: where one has a part, no more than `Program.prefill_rows`.
            expected: others wait, and could begin before any of these ends.

        Raises:
            Broken: it is no request's fault.
        """
        if any(sequence.part for sequence in sequences):
            return self._run(self._reading_batch, sequences)
        batch_of = self._guess_batch if self._guess(sequences) else functools.partial(self._decode_batch, 1 if expected else self._ahead(sequences))
        return self._run(batch_of, sequences)

    def put_adapter(self, slot: int, vector: np.ndarray, rank: int) -> None:
        """As `Program.put_adapter`; tries twice where memory is short.

        Raises:
            ServingError: this adapter can't be placed.
            Broken: the adapters on the device are lost.
        """
        for attempt in range(2):
            try:
                return self._program.put_adapter(slot, vector, rank)
            except Exception as error:
                log.warning("an adapter could not be placed: %s", cause_of(error))
                self._count("adapter", error, rows=1)
                if not self._program.bank_is_intact():
                    raise Broken(f"a fault took the adapters on the device along: {cause_of(error)}") from error
                if attempt or not is_out_of_memory(error):
                    raise failure("adapter", error) from error

    def reuse(self, source: int, slot: int, tokens: np.ndarray, record: bool) -> bool:
        """As `Program.reuse`. If it gives False, that was not possible, and the prompt has to be read from its beginning."""
        try:
            self._program.reuse(source, slot, tokens, record)
        except Exception as error:
            log.warning("the beginning of a prompt could not be reused: %s", cause_of(error))
            self._count("prefill", error, rows=1)
            if not self._program.state_is_intact():
                self._health.fault("prefill", "state_lost")
                self._lost([])
            return False
        return True

    def _reading_batch(self, sequences: list[Sequence]) -> tuple[Batch, list[int]]:
        program, vocab = self._program, self._program.config.vocab_size
        if not any(sequence.part for sequence in sequences):
            return self._decode_batch(1, sequences)
        return prefill_batch(sequences, program.prefill_rows, program.prefill_length, vocab), list(range(len(sequences)))

    def _ahead(self, sequences: list[Sequence]) -> int:
        """How many decode steps the next call has."""
        sizes = self._program.sizes
        most = min(sizes.decode_steps, max(1, int(_CALL_S / self._step_s))) if self._step_s else sizes.decode_steps
        return min(sequence.steps(most, sizes.max_seq_len) for sequence in sequences) if most > 1 else 1

    def _decode_batch(self, steps: int, sequences: list[Sequence]) -> tuple[Batch, list[int]]:
        size = next(size for size in self._program.batch_sizes if size >= len(sequences))
        rows = row_numbers(sequences, self._by_slot)
        return decode_batch(sequences, rows, size, steps, self._program.config.vocab_size), rows

    def _guess(self, sequences: list[Sequence]) -> bool:
        """Whether the next step has guesses."""
        sizes, bounds = self._program.guess_sizes, self._program.sizes
        if not sizes or len(sequences) > sizes[-1]:
            return False
        return all([sequence.guess(bounds.guesses, bounds.max_seq_len) for sequence in sequences]) and any(each.guessed for each in sequences)

    def _guess_batch(self, sequences: list[Sequence]) -> tuple[Batch, list[int]]:
        size = next(size for size in self._program.guess_sizes if size >= len(sequences))
        return guess_batch(sequences, size, self._program.sizes.guesses, self._program.config.vocab_size), list(range(len(sequences)))

    def _run(self, batch_of: _BatchOf, sequences: list[Sequence]) -> Iterator[Outcome]:
        allowed, resets = self._health.allowed_rows(), self._resets
        suspects = [[sequence] for sequence in sequences if sequence.suspect]
        others = [sequence for sequence in sequences if not sequence.suspect]
        for group in [*suspects, *(others[at : at + allowed] for at in range(0, len(others), allowed))]:
            if self._resets == resets:
                yield from self._attempt(batch_of, group)

    def _attempt(self, batch_of: _BatchOf, group: list[Sequence], last: bool = False) -> Iterator[Outcome]:
        (batch, rows), place = batch_of(group), _place(group)
        begun = time.monotonic()
        try:
            sampled = self._program.run(batch)
        except Exception as error:
            log.warning("a %s step of %d rows failed: %s", place, len(group), cause_of(error))
            yield from self._recover(batch_of, group, last, error)
            return
        if any(not sequence.part for sequence in group):
            self.steps += batch.steps
        if place == "decode":
            self._step_s = (time.monotonic() - begun) / batch.steps
        for sequence, row in zip(group, rows, strict=True):
            tokens = max(1, int(batch.emit[row]))
            if batch.guessed:
                tokens = 1 + self._right(sequence, sampled.tokens[row])
            for index in range(tokens):
                if not sampled.ok[row, index]:
                    self._health.fault(_place([sequence]), "not_finite")
                    self._program.clear(sequence.slot)
                    yield self._failed(sequence, EngineError("the model's logits are not finite", "not_finite"))
                else:
                    yield Outcome(sequence, sequence.part or 1, sampled, row, index)
                if sequence.ended:
                    break

    def _right(self, sequence: Sequence, tokens: np.ndarray) -> int:
        """How many of a sequence's guesses are what the model chose: `tokens`, one for each place."""
        guessed = sequence.guessed
        right = next((at for at, guess in enumerate(guessed) if guess != tokens[at]), len(guessed))
        if guessed:
            self.guessed, self.guessed_right = self.guessed + len(guessed), self.guessed_right + right
            sequence.lookup.learn(right)
        return right

    def _recover(self, batch_of: _BatchOf, group: list[Sequence], last: bool, error: Exception) -> Iterator[Outcome]:
        place = _place(group)
        self._count(place, error, len(group))
        if not self._program.state_is_intact():
            self._health.fault(place, "state_lost")
            if len(group) == 1 and group[0].suspect:
                yield self._failed(group[0], failure(place, error))
            self._lost(group)
            return
        if not is_out_of_memory(error):
            self._probe(error)
        if len(group) == 1:
            if last:
                yield self._failed(group[0], failure(place, error))
            else:
                yield from self._attempt(batch_of, group, last=True)
            return
        reading, resets = sum(sequence.part > 0 for sequence in group), self._resets
        cut = reading % len(group) or len(group) // 2  # prompts apart from answers, where there are both
        for some in (group[:cut], group[cut:]):
            if self._resets == resets:
                yield from self._attempt(batch_of, some)

    def _count(self, place: str, error: Exception, rows: int) -> None:
        """Counts a fault, and gets memory back where that was the cause."""
        out_of_memory = is_out_of_memory(error)
        self._health.fault(place, "out_of_memory" if out_of_memory else "exception")
        if out_of_memory:
            if place == "decode" and rows > 1:  # one alone would not be helped by fewer, and a step that reads prompts is of one size
                self._health.out_of_memory(rows)
            self._relieve()
            gc.collect()

    def _failed(self, sequence: Sequence, error: ServingError) -> Outcome:
        self._health.adapter_failed(sequence.request.adapter, error)
        return Outcome(sequence, error=error)

    def _lost(self, suspects: list[Sequence]) -> None:
        try:
            self._program.reset()
        except Exception as error:
            raise Broken(f"a fault took the state along, and it can't be made anew: {cause_of(error)}") from error
        self._resets += 1
        log.warning("a fault took the state along; all that runs begins anew")
        self._begin_anew(suspects)

    def _probe(self, error: Exception) -> None:
        try:
            self._program.run(idle_batch(self._program.batch_sizes[0], 1, self._program.config.vocab_size))
        except Exception as again:
            raise Broken(cause_of(again)) from error


def _place(group: list[Sequence]) -> str:
    """What a step with those sequences is called."""
    if not any(sequence.part for sequence in group):
        return "decode"
    return "mixed" if len(group) > 1 else "prefill"


def failure(place: str, error: Exception) -> ServingError:
    """What the request is told that `error` ended in a step, or as its adapter was placed."""
    if is_out_of_memory(error):
        return Unavailable(f"the device has no memory left for this request ({place}): {cause_of(error)}", 1, "out_of_memory")
    return EngineError(f"the {place} step failed for this request: {cause_of(error)}", "exception")


def is_out_of_memory(error: Exception) -> bool:
    """Whether host or device had no memory. XLA's errors tell by their text only."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def cause_of(error: Exception) -> str:
    """Type and first line of an exception, short enough for an answer."""
    if isinstance(error, Broken):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
