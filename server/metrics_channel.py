"""From the processes that count to the one that shows: a registry, and from then on what changes in it, over a local socket.

Each sender is a child of the same `tritonserver`, whose process id names the socket (Linux's abstract namespace: nothing is left on disk).
A sender that ends leaves its counts behind. Knows no Triton.
"""

import json
import os
import socket
import struct
import threading
import uuid
from collections.abc import Callable
from typing import Any

from jaxlora.service.metrics import COUNTER, INFO, METRICS, Distribution, Labels, Registry, Values, pick

INTERVAL_S = 0.25
REMEMBERED = 16
"""Senders that have ended whose counts are kept apart: one that connects again tells everything again."""
MAX_MESSAGE_BYTES = 1 << 26
_SIZE, _NAME_BYTES = struct.Struct("!I"), 16


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
        self._name = uuid.uuid4().bytes
        self._socket: socket.socket | None = None
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
                self._send()
            except Exception as error:  # metrics must never end the service; the next round may do better
                print(f"metrics could not be sent: {type(error).__name__}: {error}", flush=True)

    def _send(self) -> None:
        try:
            news = self._registry.changes()
            if self._socket is None:
                self._socket = self._connect()
                news = self._registry.read()
            if any(news):
                message = to_json(news)
                self._socket.sendall(_SIZE.pack(len(message)) + message)
        except OSError:  # the collector is not there yet, or was started anew
            if self._socket is not None:
                self._socket.close()
            self._socket = None

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(5)
            connection.connect(self._to)
            connection.sendall(self._name)
        except OSError:
            connection.close()
            raise
        return connection


class Collector:
    """Takes in what every sender tells."""

    def __init__(self, at: str | None = None):
        self._lock = threading.Lock()
        self._living: dict[bytes, Values] = {}
        self._ended: dict[bytes, Values] = {}
        self._forgotten: Values = ({}, {})
        self._changed: set[tuple[str, Labels]] = set()
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(at or address())
        self._listening.listen()
        self._accepting = threading.Thread(target=self._accept, name="metrics-senders", daemon=True)
        self._accepting.start()

    def changes(self) -> Values:
        """What any sender has told since the last call: all counts together, and the gauges of the senders that live."""
        with self._lock:
            changed, self._changed = self._changed, set()
            merged: Values = ({}, {})
            for values in (self._forgotten, *self._ended.values(), *self._living.values()):
                add(merged, pick(values, changed))
            return pick(merged, changed)

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
            threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        told: Values = ({}, {})
        name = b""
        with connection, connection.makefile("rb") as stream:
            try:
                name = stream.read(_NAME_BYTES)
                while (head := stream.read(_SIZE.size)) and len(head) == _SIZE.size:
                    size = _SIZE.unpack(head)[0]
                    news = from_json(stream.read(size) if size <= MAX_MESSAGE_BYTES else b"")
                    with self._lock:
                        replace(told, news)
                        self._living[name] = told  # in the place of what came over a connection that broke
                        self._ended.pop(name, None)
                        self._changed.update((name, labels) for part in news for name, series in part.items() for labels in series)
            except (OSError, ValueError, KeyError, TypeError):
                pass  # what was read before it stands
        with self._lock:
            if self._living.get(name) is not told:
                return
            values, distributions = self._living.pop(name)
            self._ended[name] = {metric: series for metric, series in values.items() if METRICS[metric].kind == COUNTER}, distributions
            if len(self._ended) > REMEMBERED:
                add(self._forgotten, self._ended.pop(next(iter(self._ended))))


def replace(values: Values, news: Values) -> None:
    """Puts newer values in the place of those that have the same labels; an info has one series."""
    for here, newer in zip(values, news, strict=True):
        for name, series in newer.items():
            if METRICS[name].kind == INFO:
                here[name] = series
            else:
                here.setdefault(name, {}).update(series)


def add(values: Values, more: Values) -> None:
    """Adds counts, and values of histograms, to those that are there; takes over gauges and infos."""
    for name, series in more[0].items():
        here = values[0].setdefault(name, {})
        if METRICS[name].kind == INFO:
            here.clear()
        for labels, value in series.items():
            here[labels] = value + here.get(labels, 0) if METRICS[name].kind == COUNTER else value
    for name, found in more[1].items():
        here = values[1].setdefault(name, {})
        for labels, new in found.items():
            old = here.get(labels) or Distribution([0] * len(new.counts), [0.0] * len(new.sums))
            here[labels] = Distribution(
                [one + other for one, other in zip(old.counts, new.counts, strict=True)],
                [one + other for one, other in zip(old.sums, new.sums, strict=True)],
            )


def to_json(values: Values) -> bytes:
    """Values as they are sent."""
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
    """Raises ValueError, KeyError or TypeError for what can't be read so."""
    content = json.loads(data)
    return (
        {name: {tuple(labels): value for labels, value in series} for name, series in content["values"].items() if name in METRICS},
        {
            name: {tuple(labels): Distribution(counts, sums) for labels, counts, sums in series}
            for name, series in content["distributions"].items()
            if name in METRICS
        },
    )
