"""When responses in the middle of streams are sent: what is due is handed on, what comes too early waits, and gathers tokens meanwhile.

A response costs server and client most of a millisecond of a core, which a small machine takes from generation. So the streams
together get a number of responses a second, and each its share: one or two streams notice nothing, many get several tokens at a time.
Knows no Triton: `tests/test_pacing.py` runs it on a clock of its own.
"""

import heapq
import itertools
import os
from typing import Generic, TypeVar

PER_CORE = 100.0  # responses a second: 16 streams on two cores then hear 12 times a second, faster than one reads

Stream = TypeVar("Stream")


class Pace(Generic[Stream]):
    """The streams that wait for their turn. Not thread-safe: one thread calls it.

    Arguments:
        rate: responses a second for all streams together; 0: `PER_CORE` for each CPU core that the process may use.
    """

    def __init__(self, rate: float = 0.0):
        self._rate = rate or PER_CORE * len(os.sched_getaffinity(0))
        self._sent: dict[Stream, float] = {}  # open streams, with the time of their last response
        self._waiting: list[tuple[float, int, Stream]] = []
        self._order = itertools.count()

    def due(self, stream: Stream, now: float) -> bool:
        """Whether a response of a stream may be sent now. Otherwise `take` gives the stream when it may."""
        at = self._sent.get(stream, -float("inf")) + len(self._sent) / self._rate
        if now < at:
            heapq.heappush(self._waiting, (at, next(self._order), stream))
            return False
        self._sent[stream] = now
        return True

    def ended(self, stream: Stream) -> None:
        """The stream sends nothing any more."""
        self._sent.pop(stream, None)

    def wait(self, now: float) -> float | None:
        """Seconds until the next stream that waits is due; None: none waits."""
        return max(0.0, self._waiting[0][0] - now) if self._waiting else None

    def take(self, now: float) -> list[Stream]:
        """The streams that have waited and are due now; their response counts as sent."""
        taken = []
        while self._waiting and self._waiting[0][0] <= now:
            stream = heapq.heappop(self._waiting)[2]
            if stream in self._sent:
                self._sent[stream] = now
                taken.append(stream)
        return taken
