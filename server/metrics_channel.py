"""From the processes that count to the one that shows: whole snapshots of a registry, over a local socket.

Each sender is a child of the same `tritonserver`, whose process id names the socket (Linux's abstract namespace: nothing is left on disk).
A sender that ends leaves its counts behind. Knows no Triton.
"""

import json
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

from jaxlora.service.metrics import COUNTER, METRICS, Distribution, Registry, Values

INTERVAL_S = 0.25
MAX_SNAPSHOT_BYTES = 1 << 26
_SIZE = struct.Struct("!I")


def address() -> str:
    """Where the models of one server meet."""
    return f"\0jaxlora-metrics-{os.getppid()}"


class Sender:
    """Sends what a registry holds some times a second, where it has changed; waits for a collector that is not there yet.

    Arguments:
        record: called before each look at the registry, to bring it up to date.
    """

    def __init__(self, registry: Registry, record: Callable[[], None] = lambda: None, to: str | None = None):
        self._registry, self._record, self._to = registry, record, to or address()
        self._socket: socket.socket | None = None
        self._sent = b""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Sends once more, if there is a collector, and ends the thread."""
        self._closing.set()
        self._thread.join()
        if self._socket is not None:
            self._socket.close()

    def _run(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(INTERVAL_S)
            try:
                self._record()
                self._send(to_json(self._registry.read()))
            except Exception as error:  # metrics must never end the service; the next round may do better
                print(f"metrics could not be sent: {type(error).__name__}: {error}", flush=True)

    def _send(self, snapshot: bytes) -> None:
        if snapshot == self._sent:
            return
        try:
            if self._socket is None:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.settimeout(5)
                connection.connect(self._to)
                self._socket = connection
            self._socket.sendall(_SIZE.pack(len(snapshot)) + snapshot)
            self._sent = snapshot
        except OSError:  # the collector is not there yet, or was started anew
            if self._socket is not None:
                self._socket.close()
            self._socket, self._sent = None, b""


class Collector:
    """Takes in the snapshots of every sender."""

    def __init__(self, at: str | None = None):
        self._lock = threading.Lock()
        self._living: dict[int, Values] = {}
        self._ended = Registry()
        self._count = 0
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(at or address())
        self._listening.listen()
        self._accepting = threading.Thread(target=self._accept, name="metrics-senders", daemon=True)
        self._accepting.start()

    def merged(self) -> Values:
        """All counts together, and the gauges of the senders that live."""
        with self._lock:
            merged = Registry()
            merged.merge(self._ended.read())
            for values in self._living.values():
                merged.merge(values)
            return merged.read()

    def close(self) -> None:
        """Takes no more senders, and gives the address back."""
        self._listening.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the thread
        self._accepting.join()
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            # The name of the socket is no secret: only this user's processes may send.
            _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user != os.getuid():
                connection.close()
                continue
            self._count += 1
            threading.Thread(target=self._receive, args=(connection, self._count), daemon=True).start()

    def _receive(self, connection: socket.socket, number: int) -> None:
        with connection, connection.makefile("rb") as stream:
            try:
                while (head := stream.read(_SIZE.size)) and len(head) == _SIZE.size:
                    size = _SIZE.unpack(head)[0]
                    data = stream.read(size) if size <= MAX_SNAPSHOT_BYTES else b""
                    values = from_json(data)
                    with self._lock:
                        self._living[number] = values
            except (OSError, ValueError, KeyError, TypeError):
                pass  # what was read before it stands
        with self._lock:
            values, distributions = self._living.pop(number, ({}, {}))
            counters = {name: series for name, series in values.items() if METRICS[name].kind == COUNTER}
            self._ended.merge((counters, distributions))


def to_json(values: Values) -> bytes:
    """A snapshot as it is sent."""
    plain, distributions = values
    content: dict[str, Any] = {
        "values": {name: [[list(labels), value] for labels, value in series.items()] for name, series in plain.items() if series},
        "distributions": {
            name: [[list(labels), found.counts, found.sums] for labels, found in series.items()]
            for name, series in distributions.items()
            if series
        },
    }
    return json.dumps(content, separators=(",", ":")).encode()


def from_json(data: bytes) -> Values:
    """Raises ValueError, KeyError or TypeError for what is no snapshot."""
    content = json.loads(data)
    return (
        {name: {tuple(labels): value for labels, value in series} for name, series in content["values"].items() if name in METRICS},
        {
            name: {tuple(labels): Distribution(counts, sums) for labels, counts, sums in series}
            for name, series in content["distributions"].items()
            if name in METRICS
        },
    )
