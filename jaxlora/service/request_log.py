"""One JSON line for each request. Lines are written by a thread of their own, so that a slow disk or pipe never holds up a request.

Knows nothing of requests: what goes into a line is given. Several processes may write to one file. Imports no JAX.
"""

import json
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from jaxlora.errors import SetupError

MAX_WAITING_LINES = 10_000
STDOUT, NONE = "stdout", "none"


class RequestLog:
    """A log of JSON objects, in the order in which they came.

    Arguments:
        target: `stdout`, `none`, or a file that is appended to.

    Raises:
        SetupError: the file can't be opened.
    """

    def __init__(self, target: str = NONE):
        self.dropped = 0
        """Lines that could not be written, or not in time."""
        self._lines: queue.Queue[Callable[[], Mapping[str, Any]] | None] = queue.Queue(MAX_WAITING_LINES)
        self._closed = target == NONE
        if self._closed:
            return
        try:
            # Unbuffered: each line is one write, so that lines of several processes stay whole.
            self._file = None if target == STDOUT else open(target, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise SetupError(f"REQUEST_LOG: can't write {target} ({error.strerror})") from None
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def write(self, line: Callable[[], Mapping[str, Any]]) -> None:
        """Queues a line and returns at once. `line` makes it, in the log's thread."""
        if self._closed:
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes what is queued, but waits no longer than `timeout_s` seconds for a disk or pipe that is stuck."""
        if self._closed:
            return
        self._closed = True
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._put(json.dumps(line(), ensure_ascii=False) + "\n")
            except Exception:  # a full disk, a closed pipe: the next line may fit again
                self.dropped += 1
        if self._file is not None:
            self._file.close()

    def _put(self, text: str) -> None:
        if self._file is not None:
            self._file.write(text.encode("utf-8", "replace"))
        else:
            sys.stdout.write(text)
            sys.stdout.flush()
