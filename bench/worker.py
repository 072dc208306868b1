"""A driver in a process and an environment of its own, and the JSON lines between it and the benchmark.

Knows how to call a driver; knows neither what it measures nor what it runs. Imports the standard library alone, as the child's side
runs in environments that hold little else.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from bench import processes
from jaxlora import allocator

GREEDY = {"temperature": 0.0}
START_TIMEOUT_S = 900.0
CALL_TIMEOUT_S = 300.0
EXIT_TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, as token ids and as the text that encodes to exactly these. `adapter` is a name of the set-up; empty: base model.
    `sampling` has the names that all front doors know."""

    prompt: list[int]
    text: str
    answer: int
    adapter: str = ""
    sampling: Mapping[str, float] = dataclasses.field(default_factory=GREEDY.copy)


@dataclasses.dataclass
class Answer:
    """What came back of a request. Times are seconds of `time.monotonic`, which all processes of a machine share.

    `events` holds (time, tokens) for each response, the latter reckoned where a response does not say how many it carries; `tokens` is the
    number of all. `ids` may be empty: some front doors give text only.
    """

    sent: float
    events: list[tuple[float, float]]
    tokens: int
    ids: list[int] = dataclasses.field(default_factory=list)


class Unsupported(Exception):
    """This system can't do that; `str()` says why, for the table."""


class DriverFailed(Exception):
    """A driver ended or raised. `str()` says what it said."""


class Driver(Protocol):
    """One system under test. Further methods may be called by name, with JSON arguments."""

    def start(self, setup: dict[str, Any]) -> dict[str, Any]:
        """Gets ready for requests; returns `versions`, and as `pid` the process whose tree is measured (default: the driver's own)."""

    def run(self, requests: list[Request], concurrency: int) -> list[Answer]:
        """Answers all requests, so many at a time, greedily, to their full length. The answers are in the order of the requests."""

    def stop(self) -> None:
        """Ends everything that `start` started."""


def serve(driver: Driver) -> None:
    """The child's side: obeys lines on stdin until its end. What libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        for line in sys.stdin:
            json.dump(_obey(driver, json.loads(line)), out)
            out.write("\n")
            out.flush()
    finally:
        driver.stop()


def _obey(driver: Driver, message: dict[str, Any]) -> dict[str, Any]:
    try:
        if message["op"] == "run":
            requests = [Request(**request) for request in message["requests"]]
            return {"value": [dataclasses.asdict(answer) for answer in driver.run(requests, message["concurrency"])]}
        return {"value": getattr(driver, message["op"])(**message.get("arguments", {}))}
    except Unsupported as reason:
        return {"unsupported": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


class Worker:
    """The parent's side of one driver process.

    Arguments:
        name: for messages.
        module: run with `python -m`.
        log_path: what the driver and its libraries print.
    """

    def __init__(self, name: str, python: str, module: str, log_path: pathlib.Path, folder: pathlib.Path):
        self.name, self.log_path = name, log_path
        self._log = log_path.open("ab")
        self._process = subprocess.Popen(
            [python, "-m", module], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env=allocator.environment(os.environ), text=True,
        )
        self.pid = self.driver_pid = self._process.pid
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def start(self, setup: Mapping[str, Any]) -> dict[str, Any]:
        """Starts the system. From here on `pid` is the process whose tree counts as the system's."""
        started = self.call("start", START_TIMEOUT_S, setup=setup)
        self.pid = started.get("pid", self.pid)
        return started

    def run(self, requests: Sequence[Request], concurrency: int) -> list[Answer]:
        """See `Driver.run`."""
        message = {"op": "run", "requests": [dataclasses.asdict(request) for request in requests], "concurrency": concurrency}
        return [Answer(**answer) for answer in self._ask(message, CALL_TIMEOUT_S)]

    def call(self, op: str, timeout_s: float = CALL_TIMEOUT_S, **arguments: Any) -> Any:
        """Calls another method of the driver.

        Raises:
            Unsupported: the system can't do that.
            DriverFailed: it raised, ended, or did not answer in time, and then is ended.
        """
        return self._ask({"op": op, "arguments": arguments}, timeout_s)

    def stop(self) -> None:
        """Lets the driver end what it started, and ends the driver."""
        try:
            self._process.stdin.close()
            self._process.wait(EXIT_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            self._kill()
        self._log.close()

    def _kill(self) -> None:
        for pid in processes.tree(self.driver_pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _ask(self, message: dict[str, Any], timeout_s: float) -> Any:
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self._kill()  # its answer would be taken for that to the next question
            raise DriverFailed(f"{self.name}: no answer to {message['op']!r} in {timeout_s:g} s; its log is {self.log_path}") from None
        except OSError:
            line = ""
        if not line:
            raise DriverFailed(f"{self.name} ended; its log is {self.log_path}")
        reply = json.loads(line)
        if "unsupported" in reply:
            raise Unsupported(reply["unsupported"])
        if "error" in reply:
            raise DriverFailed(f"{self.name}: {reply['error']}; its log is {self.log_path}")
        return reply["value"]

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")
