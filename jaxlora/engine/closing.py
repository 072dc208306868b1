"""How an engine comes to its end: at once, when its work is done or its grace is over, or on an error. Knows no requests."""

import math
import time
from collections.abc import Callable

from jaxlora.errors import EngineError, ServingError, Unavailable

_TEXT = "the server is shutting down"


class Closing:
    """Whether requests are still taken, and until when those that were may run. Any thread may call it."""

    def __init__(self) -> None:
        self.error: EngineError | None = None
        self._grace_s, self._until = 0.0, math.inf

    def begin(self, grace_s: float) -> None:
        """From now on nothing is taken any more, and what runs has so many seconds; the shortest grace of all calls holds."""
        until = time.monotonic() + grace_s
        if until < self._until:
            self._grace_s, self._until = grace_s, until

    def check(self) -> None:
        """Raises Unavailable where no more requests are taken."""
        if self.error is not None:
            raise Unavailable(str(self.error), reason="engine_stopped")
        if self._until < math.inf:
            raise Unavailable(_TEXT, reason="shutting_down")

    def is_over(self, is_idle: Callable[[], bool]) -> bool:
        """Whether the engine ends now; `is_idle` says whether it has nothing to do."""
        return self._until < math.inf and (self.left_s() <= 0 or is_idle())

    def left_s(self) -> float:
        """Seconds until what runs is given up."""
        return self._until - time.monotonic()

    def failure(self) -> ServingError:
        """What a request is told that is left at the end."""
        if self.error is not None:
            return self.error
        grace = f", and its grace period of {self._grace_s:g} s (GRACE_S) is over" if self._grace_s else ""
        return Unavailable(f"{_TEXT}{grace}", reason="shutting_down")
