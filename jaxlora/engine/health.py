"""How the engine fares: its breakers behind one lock, and the faults since the start. Any thread may call it."""

import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable

from jaxlora.engine.breakers import AdapterBreaker, LatencyBreaker, MemoryBreaker, State
from jaxlora.errors import ServingError, Unavailable

log = logging.getLogger(__name__)

QUEUE, TOKEN = "queue time", "time per output token"
PLACES, KINDS = ("prefill", "decode", "mixed", "adapter"), ("exception", "out_of_memory", "not_finite", "state_lost")


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """When the breakers open, and for how long; times in seconds. The mean `queue_s` or `token_s` over `window_s`, 0: no bound."""

    queue_s: float = 0.0
    token_s: float = 0.0
    window_s: float = 10.0
    open_s: float = 5.0
    adapter_failures: int = 3
    adapter_open_s: float = 30.0
    memory_grow_s: float = 30.0


class Health:
    """Told of what goes well and what does not; tells who may pass.

    Arguments:
        slots: rows that may run when all is well.
        clock: seconds that only grow.
    """

    def __init__(self, at: Thresholds, slots: int, clock: Callable[[], float] = time.monotonic):
        self._latency = LatencyBreaker({QUEUE: at.queue_s, TOKEN: at.token_s}, at.window_s, at.open_s)
        self._adapters = AdapterBreaker(at.adapter_failures, at.adapter_open_s)
        self._memory = MemoryBreaker(slots, at.memory_grow_s)
        self._clock = clock
        self._lock = threading.Lock()
        self._stepped: float | None = None
        self._faults = dict.fromkeys(itertools.product(PLACES, KINDS), 0)

    def check(self, adapter: Hashable | None) -> None:
        """Lets a request pass.

        Raises:
            Unavailable: a breaker refuses it; says why and for how long.
        """
        with self._lock:
            now = self._clock()
            if wait := self._latency.refusal_s(now):
                raise Unavailable(f"the server is too slow to take more: {self._latency.cause}", _seconds(wait), "latency")
            if adapter is not None and (wait := self._adapters.refusal_s(adapter, now)):
                cause = self._adapters.cause(adapter)
                raise Unavailable(f"this adapter's requests fail one after another, the last one so: {cause}", _seconds(wait), "adapter_failing")

    def waited(self, seconds: float) -> None:
        """A request got its slot after so many seconds."""
        self._observe(QUEUE, seconds)

    def stepped(self, steps: int) -> None:
        """A turn with so many decode steps has ended; 0 where there was nothing to decode."""
        before, self._stepped = self._stepped, self._clock() if steps else None
        if before is not None and self._stepped is not None:
            for _ in range(steps):
                self._observe(TOKEN, (self._stepped - before) / steps)

    def adapter_failed(self, adapter: Hashable | None, error: ServingError) -> None:
        """A request failed: not for a reason that passes, so it may be its adapter."""
        if adapter is None or isinstance(error, Unavailable):
            return
        with self._lock:
            refused = self._adapters.failed(adapter, str(error), self._clock())
        if refused:
            log.warning("breaker: %s is refused for now; its requests fail one after another: %s", adapter, error)

    def adapter_succeeded(self, adapter: Hashable | None) -> None:
        """A request of this adapter finished."""
        with self._lock:
            self._adapters.succeeded(adapter)

    def out_of_memory(self, rows: int) -> None:
        """There was no memory for a step of so many rows."""
        with self._lock:
            self._memory.failed(rows, self._clock())
            allowed = self._memory.allowed(self._clock())
        log.warning("breaker: no memory for a step of %d rows; %d may run for now", rows, allowed)

    def allowed_rows(self) -> int:
        """How many requests may run now."""
        with self._lock:
            return self._memory.allowed(self._clock())

    def fault(self, place: str, kind: str) -> None:
        """Counts a fault: one of KINDS at one of PLACES."""
        with self._lock:
            self._faults[place, kind] += 1

    def faults(self) -> dict[tuple[str, str], int]:
        """Faults since the start, by place and kind."""
        with self._lock:
            return dict(self._faults)

    def states(self) -> dict[str, State]:
        """The state of each breaker by its name."""
        with self._lock:
            now = self._clock()
            return {"latency": self._latency.state(now), "memory": self._memory.state, "adapter": self._adapters.state(now)}

    def _observe(self, name: str, seconds: float) -> None:
        with self._lock:
            now = self._clock()
            before = self._latency.state(now)
            self._latency.observe(name, seconds, now)
            after, cause = self._latency.state(now), self._latency.cause
        if after is not before:
            log.warning("breaker: latency is %s%s", after.name.lower(), f": {cause}" if after is State.OPEN else "")


def _seconds(wait: float) -> float:
    """A hint for a client: not zero, and no more digits than it needs."""
    return max(0.1, round(wait, 1))
