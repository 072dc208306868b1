"""The waiting requests: who may wait, and who gets the next slot.

Adapters take turns by the tokens that they were served: the one that was served least comes first (virtual token counter, Sheng et al.,
"Fairness in Serving Large Language Models", OSDI 2024). Requests of one adapter go by priority, then by arrival. Knows no thread, no
clock and no device: one thread calls at a time, and times come from the caller, in seconds.
"""

import bisect
import collections
import dataclasses
import math
from collections.abc import Hashable, Iterator

from jaxlora.engine.limits import Account, Limits, Party
from jaxlora.engine.slots import Sequence
from jaxlora.engine.token_buckets import TokenBuckets
from jaxlora.errors import Unavailable

PROMPT_COST, ANSWER_COST = 1, 2
"""What a token counts, as in the paper. One that was in the cache already counts nothing."""


@dataclasses.dataclass(eq=False)
class _Lane:
    """The requests of one account. `settled` is the cost of those that have ended, raised after times without a request."""

    account: Account
    settled: float
    waiting: list[Sequence] = dataclasses.field(default_factory=list)
    running: list[Sequence] = dataclasses.field(default_factory=list)

    @property
    def served(self) -> float:
        return self.settled + sum(_cost(sequence) for sequence in self.running)

    @property
    def reading(self) -> bool:
        """Whether one of its prompts still waits for a step that reads it to its end."""
        return any(sequence.left for sequence in self.running)


class FairQueue:
    """Requests from their arrival to their end, waiting and running.

    Arguments:
        slots: requests that can run at the same time, the reserved ones among them.
        credit: tokens by which an account that comes back may be behind. One that uses little then gets a whole prompt read before
            one that uses much gets its next, and none can save up more than that.
    """

    def __init__(self, slots: int, credit: int, limits: Limits):
        self._free, self._credit, self._limits = slots, credit, limits
        self._buckets = TokenBuckets(limits)
        self._shared_slots = slots - limits.reserved_slots
        self._lanes: dict[Account, _Lane] = {}
        self._gone: dict[Account, float] = {}  # what accounts without a request were served
        self._waiting: collections.Counter[Party] = collections.Counter()
        self._running: collections.Counter[Party] = collections.Counter()
        self._virtual_time = 0.0  # what the account that last got a slot had been served before
        self._last_start = 0.0
        self._interval = 0.0  # mean seconds from one slot to the next while requests wait

    def __len__(self) -> int:
        """How many wait."""
        return sum(len(lane.waiting) for lane in self._lanes.values())

    def __iter__(self) -> Iterator[Sequence]:
        """Those that wait."""
        for lane in self._lanes.values():
            yield from lane.waiting

    def add(self, sequence: Sequence) -> None:
        """Lets a request wait.

        Raises:
            Unavailable: too many wait already, of all or of its adapter or user, or its adapter or user is over its token rate.
        """
        account = sequence.request.account
        lane = self._lanes.get(account) or _Lane(account, self._gone.get(account, 0.0))
        self._check_room(lane)
        self._buckets.take(account, _most_tokens(sequence), sequence.submitted)
        if not lane.waiting:
            lane.settled += max(0.0, self._virtual_time - self._credit - lane.served)
        self._lanes[account] = lane
        self._gone.pop(account, None)
        bisect.insort(lane.waiting, sequence, key=lambda each: (each.request.priority, each.submitted))
        self._count(self._waiting, account, 1)

    def first(self, passed: set[Hashable]) -> Sequence | None:
        """The request that gets the next slot; None if no slot is free for any. Those for an adapter in `passed` are passed over.

        An account gets no slot while it has a prompt to read: the slot would only wait, and be missing when another account comes.
        """
        if self._free == 0:
            return None
        lanes = [lane for lane in self._lanes.values() if lane.waiting and not lane.reading and self._open_slots(lane) > 0]
        for lane in sorted(lanes, key=lambda lane: (lane.served, lane.waiting[0].submitted)):
            for sequence in lane.waiting:
                if sequence.request.adapter not in passed:
                    return sequence
        return None

    def start(self, sequence: Sequence) -> None:
        """It has got a slot."""
        account = sequence.request.account
        lane = self._lanes[account]
        self._virtual_time = max(self._virtual_time, lane.served)
        self._interval += 0.1 * (sequence.started - max(self._last_start, sequence.submitted) - self._interval)
        self._last_start = sequence.started
        lane.waiting.remove(sequence)
        lane.running.append(sequence)
        self._free -= 1
        self._count(self._waiting, account, -1)
        self._count(self._running, account, 1)

    def next_prompt(self, sequences: list[Sequence]) -> Sequence:
        """Whose prompt is read on, of some that run: the account that was served least, then the one that got its slot first."""
        return min(sequences, key=lambda sequence: (self._lanes[sequence.request.account].served, sequence.started))

    def end(self, sequence: Sequence) -> None:
        """It waits or runs no longer."""
        account = sequence.request.account
        lane = self._lanes[account]
        if sequence in lane.running:
            lane.running.remove(sequence)
            lane.settled += _cost(sequence)
            self._free += 1
            self._count(self._running, account, -1)
            unused = _most_tokens(sequence) - len(sequence.request.prompt) - sequence.handed_out
        else:
            lane.waiting.remove(sequence)
            self._count(self._waiting, account, -1)
            unused = _most_tokens(sequence)
        self._buckets.give_back(account, unused)
        if not lane.waiting and not lane.running:
            self._remember(self._lanes.pop(account))

    def wait_s(self, places: int) -> int:
        """Seconds that it takes until so many requests more have got a slot, as things went lately; at least 1."""
        return max(1, math.ceil(places * self._interval))

    def _check_room(self, lane: _Lane) -> None:
        # Those that a free slot takes at once don't wait.
        at_once = max(0, self._open_slots(lane))
        if len(self) - at_once >= self._limits.max_queue:
            raise Unavailable(f"the queue is full: {self._limits.max_queue} requests wait for a slot (MAX_QUEUE)", self.wait_s(1), "queue_full")
        for party, bounds in self._limits.of(lane.account):
            if bounds.max_queue and self._waiting[party] - at_once >= bounds.max_queue:
                text = f"{bounds.max_queue} requests of {party} wait for a slot ({party.setting('MAX_QUEUE')})"
                raise Unavailable(text, self.wait_s(1), "queue_share_full")

    def _open_slots(self, lane: _Lane) -> int:
        """How many slots are free for a lane, less than 1 if none is."""
        present = len(self._lanes) + (lane.account not in self._lanes)
        has_its_share = len(lane.running) >= self._shared_slots / present
        free = self._free - (self._limits.reserved_slots if has_its_share else 0)
        bounds = (bounds.max_running - self._running[party] for party, bounds in self._limits.of(lane.account) if bounds.max_running)
        return min((free, *bounds))

    def _remember(self, lane: _Lane) -> None:
        # Whoever is as far behind as a newcomer is one.
        newcomer = self._virtual_time - self._credit
        self._gone[lane.account] = lane.settled
        self._gone = {account: served for account, served in self._gone.items() if served > newcomer}

    def _count(self, counter: "collections.Counter[Party]", account: Account, change: int) -> None:
        for party, _ in self._limits.of(account):
            counter[party] += change
            if not counter[party]:
                del counter[party]


def _cost(sequence: Sequence) -> int:
    return PROMPT_COST * (len(sequence.request.prompt) - sequence.cached) + ANSWER_COST * sequence.handed_out


def _most_tokens(sequence: Sequence) -> int:
    return len(sequence.request.prompt) + sequence.request.params.max_tokens
