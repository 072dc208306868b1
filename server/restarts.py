"""How long to wait before a server is started again. Knows no server."""


class Backoff:
    """A pause that doubles from `first_s` to `most_s` seconds, and begins anew after a server that ran `good_s` seconds."""

    def __init__(self, first_s: float = 1.0, most_s: float = 60.0, good_s: float = 600.0):
        self._first_s, self._most_s, self._good_s = first_s, most_s, good_s
        self._next_s = first_s

    def pause_s(self, ran_s: float) -> float:
        """Seconds to wait now, after a server that ran so many seconds."""
        pause = self._first_s if ran_s >= self._good_s else self._next_s
        self._next_s = min(2 * pause, self._most_s)
        return pause
