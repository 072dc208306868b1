"""Prompts that begin alike: what the slots' caches still hold, and which of it a new prompt can use.

A slot keeps its keys and values when its sequence has ended, until another one takes it. They belong to an adapter version and to token
ids, neither of which ever changes, so nothing here becomes stale. Pure bookkeeping: copies nothing itself.
"""

import dataclasses
from collections.abc import Hashable

import numpy as np

from jaxlora.engine.program import Program
from jaxlora.engine.slots import Sequence

LEAST = 16  # tokens; to reuse fewer isn't worth a copy


@dataclasses.dataclass
class Held:
    """What one slot's cache holds: the keys and values of `tokens`, computed with `adapter`. `used` orders slots by age."""

    adapter: Hashable
    tokens: np.ndarray
    used: int


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a new sequence goes: into `slot`, the first `length` of its tokens from the cache of `source` (the same slot: no copy)."""

    slot: int
    source: int
    length: int


class Prefixes:
    """The contents of all slots. Used by the engine's thread alone.

    Arguments:
        slots: how many there are.
        unit: tokens are reused in multiples of it.
        answers: whether the keys and values of generated tokens may be reused too.
    """

    def __init__(self, slots: int, unit: int = 1, answers: bool = True):
        self._held: list[Held | None] = [None] * slots
        self._unit, self._answers = unit, answers
        self._clock = 0

    @classmethod
    def of(cls, program: Program, reuse: bool) -> "Prefixes":
        """For the slots of a program; without `reuse` nothing is ever found."""
        if not reuse:
            return cls(program.sizes.slots, unit=program.sizes.max_seq_len)
        # What differs in its bits by how a sequence was cut into steps may be reused only where it would have been cut the same.
        invariant = program.cut_invariant
        return cls(program.sizes.slots, unit=1 if invariant else program.sizes.prefill_chunk, answers=invariant)

    def place(self, adapter: Hashable, prompt: tuple[int, ...], free: list[int]) -> Place:
        """The best place for a prompt. The last token of a prompt is never reused, since its logits are needed.

        Arguments:
            free: the slots that nobody uses, at least one.
        """
        tokens = np.asarray(prompt[:-1], np.int32)
        shared = [self._shared(held, adapter, tokens) for held in self._held]
        source = max(range(len(shared)), key=lambda slot: (shared[slot], slot in free))
        length = shared[source]
        oldest = min(free, key=lambda slot: -1 if self._held[slot] is None else self._held[slot].used)
        if length < max(LEAST, self._unit):
            return Place(oldest, oldest, 0)
        # In place where that loses little of what others could use; otherwise a copy.
        in_place = source in free and (2 * length >= len(self._held[source].tokens) or source == oldest)
        self._touch(source)
        return Place(source if in_place else oldest, source, length)

    def is_coming(self, adapter: Hashable, prompt: tuple[int, ...], read: list[Sequence]) -> bool:
        """Whether a prompt will find more of itself here than now, once others, at least one, have been read."""
        tokens = np.asarray(prompt[:-1], np.int32)
        coming = (Held(other.request.adapter, np.asarray(other.request.prompt, np.int32), 0) for other in read)
        most = max(self._shared(held, adapter, tokens) for held in coming)
        return most >= LEAST and most > max(self._shared(held, adapter, tokens) for held in self._held)

    def forget(self, slot: int) -> None:
        """What the slot held is being overwritten, or isn't to be trusted."""
        self._held[slot] = None

    def forget_all(self) -> None:
        """The caches of all slots are lost."""
        self._held = [None] * len(self._held)

    def hold(self, sequence: Sequence) -> None:
        """The cache of a sequence's slot holds its first `written` tokens, and will until `forget`."""
        tokens = [*sequence.request.prompt, *sequence.answer] if self._answers else sequence.request.prompt
        self._held[sequence.slot] = Held(sequence.request.adapter, np.asarray(tokens[: sequence.written], np.int32), 0)
        self._touch(sequence.slot)

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._held[slot].used = self._clock

    def _shared(self, held: Held | None, adapter: Hashable, tokens: np.ndarray) -> int:
        if held is None or held.adapter != adapter:
            return 0
        size = min(len(held.tokens), len(tokens))
        differs = np.flatnonzero(held.tokens[:size] != tokens[:size])
        length = int(differs[0]) if len(differs) else size
        return length // self._unit * self._unit
