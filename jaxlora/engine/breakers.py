"""When to refuse work so that what was accepted still goes well: state machines that know times and counts, and nothing of requests.

The clock is handed in: every `now` is in seconds of one monotonic clock. Not thread-safe.
"""

import collections
import dataclasses
import enum
import math
from collections.abc import Hashable

MIN_VALUES = 8
"""Values from which a mean tells anything, and the number of requests that are let through as probes."""


class State(enum.IntEnum):
    """What a breaker does: lets all pass, lets some pass to see how it goes, refuses."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Refuses for `open_s` seconds once it is tripped; then lets `probes` pass, and as many again every `open_s` seconds, until it is closed
    or tripped again."""

    def __init__(self, open_s: float, probes: int):
        self._open_s, self._probes = open_s, probes
        self._open_until: float | None = None  # None: closed
        self._until = -math.inf
        self._left = 0

    def state(self, now: float) -> State:
        """By the clock: it is half-open as soon as a request would pass as a probe, whether or not one has come."""
        return State.CLOSED if self._open_until is None else State.OPEN if now < self._open_until else State.HALF_OPEN

    def trip(self, now: float) -> None:
        self._open_until = self._until = now + self._open_s
        self._left = 0

    def close(self) -> None:
        self._open_until = None

    def refusal_s(self, now: float) -> float:
        """0 if a request may pass, which then counts as a probe; else the seconds after which it may be tried again."""
        if self._open_until is None:
            return 0.0
        if now >= self._until:
            self._until, self._left = now + self._open_s, self._probes
        if self._left:
            self._left -= 1
            return 0.0
        return self._until - now


class Window:
    """The mean of the values of the last `seconds`."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._values: collections.deque[tuple[float, float]] = collections.deque()
        self._sum = 0.0

    def add(self, now: float, value: float) -> None:
        self._values.append((now, value))
        self._sum += value
        while self._values[0][0] < now - self._seconds:
            self._sum -= self._values.popleft()[1]

    def mean(self) -> float | None:
        """None while there are fewer than MIN_VALUES."""
        return self._sum / len(self._values) if len(self._values) >= MIN_VALUES else None

    def clear(self) -> None:
        self._values.clear()
        self._sum = 0.0


class LatencyBreaker:
    """Opens when the mean of what it watches over the last `window_s` seconds is above its bound; closes when MIN_VALUES values of each have been
    within it since, however long they took to come, and no mean above it.

    Arguments:
        bounds: in seconds, by the name of what is watched; a bound of 0 watches nothing.
    """

    def __init__(self, bounds: dict[str, float], window_s: float, open_s: float):
        self._bounds = {name: bound for name, bound in bounds.items() if bound}
        self._windows = {name: Window(window_s) for name in self._bounds}
        self._breaker = Breaker(open_s, MIN_VALUES)
        self._good = dict.fromkeys(self._bounds, 0)
        self.cause = ""

    def state(self, now: float) -> State:
        """As `Breaker.state`."""
        return self._breaker.state(now)

    def observe(self, name: str, value: float, now: float) -> None:
        """A request has just waited or a token has just taken so many seconds."""
        state = self.state(now)
        if name not in self._bounds or state is State.OPEN:
            return
        self._windows[name].add(now, value)
        self._good[name] += value <= self._bounds[name]
        mean = self._windows[name].mean()
        if mean is not None and mean > self._bounds[name]:
            self.cause = f"the {name} is {mean:.3g} s on average; the bound is {self._bounds[name]:g} s"
            self._breaker.trip(now)
            for window in self._windows.values():
                window.clear()
            self._good = dict.fromkeys(self._bounds, 0)
        elif state is State.HALF_OPEN and min(self._good.values()) >= MIN_VALUES:
            self._breaker.close()

    def refusal_s(self, now: float) -> float:
        """As `Breaker.refusal_s`."""
        return self._breaker.refusal_s(now)


@dataclasses.dataclass
class _Failing:
    breaker: Breaker
    failures: int = 0
    cause: str = ""


class AdapterBreaker:
    """Refuses an adapter whose requests have failed `failures` times in a row, and no other; one success forgives it.

    Remembers the last `keep` adapters that failed.
    """

    def __init__(self, failures: int, open_s: float, keep: int = 1000):
        self._failures, self._open_s, self._keep = failures, open_s, keep
        self._failing: collections.OrderedDict[Hashable, _Failing] = collections.OrderedDict()

    def state(self, now: float) -> State:
        """The worst of all adapters."""
        return max((failing.breaker.state(now) for failing in self._failing.values()), default=State.CLOSED)

    def failed(self, adapter: Hashable, cause: str, now: float) -> bool:
        """Counts a failure; whether the adapter is refused from now on because of it."""
        failing = self._failing.setdefault(adapter, _Failing(Breaker(self._open_s, 1)))
        self._failing.move_to_end(adapter)
        while len(self._failing) > self._keep:
            self._failing.popitem(last=False)
        failing.failures += 1
        failing.cause = cause
        if failing.failures < self._failures or failing.breaker.state(now) is State.OPEN:
            return False
        failing.breaker.trip(now)
        return True

    def succeeded(self, adapter: Hashable) -> None:
        self._failing.pop(adapter, None)

    def refusal_s(self, adapter: Hashable, now: float) -> float:
        """As `Breaker.refusal_s`, for one adapter."""
        failing = self._failing.get(adapter)
        return 0.0 if failing is None else failing.breaker.refusal_s(now)

    def cause(self, adapter: Hashable) -> str:
        """What its last failure said."""
        return self._failing[adapter].cause


class MemoryBreaker:
    """How many rows may run: all `rows`, fewer after the device had no memory for a step, and one more after every `grow_s` seconds without that."""

    def __init__(self, rows: int, grow_s: float):
        self._rows, self._grow_s = rows, grow_s
        self._allowed, self._since = rows, 0.0
        self.state = State.CLOSED

    def failed(self, rows: int, now: float) -> None:
        """There was no memory for a step of so many rows."""
        self._allowed, self._since = min(self._allowed, -(-rows // 2)), now
        self.state = State.OPEN

    def allowed(self, now: float) -> int:
        """The rows that may run now."""
        if self.state is not State.CLOSED and (grown := int((now - self._since) / self._grow_s)):
            self._allowed, self._since = min(self._rows, self._allowed + grown), self._since + grown * self._grow_s
            self.state = State.CLOSED if self._allowed == self._rows else State.HALF_OPEN
        return self._allowed
