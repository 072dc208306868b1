"""Ctrl-C while an answer comes: a call to a function, not an exception between any two steps of gRPC's code."""

import queue
import signal
import threading
from collections.abc import Callable
from typing import Self


class Interrupts:
    """As long as the `with` block lasts, each Ctrl-C calls `stop`, in a thread of its own; `seen` tells whether there was one.

    KeyboardInterrupt raised inside gRPC can be lost in a callback, or leave a lock that nobody holds. The handler only does what may
    interrupt anything: a `put` into a SimpleQueue is documented to be reentrant. To be used in the main thread.
    """

    def __init__(self, stop: Callable[[], None]):
        self.seen = False
        self._stop = stop
        self._pressed: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        self._pressed.put(False)
        self._thread.join()

    def _handle(self, number: int, frame: object) -> None:
        self.seen = True
        self._pressed.put(True)

    def _run(self) -> None:
        while self._pressed.get():
            self._stop()
