"""Between the launcher and the models that hold an engine: the launcher asks them to finish, and learns when an engine has stopped.

A model connects to a local socket (Linux's abstract namespace: nothing is left on disk) whose name it finds in its environment; where there is
none, since nobody launched the server, all of this does nothing. A connection that ends without a word is a model that has crashed. Knows no Triton.
"""

import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping

NAME, RESTARTS = "JAXLORA_LIFELINE", "JAXLORA_RESTARTS"
_DRAIN, _DRAINED, _STOPPED, _BYE = "drain", "drained", "stopped", "bye"


class Lifeline:
    """The launcher's end.

    Arguments:
        restarts: how many servers came before this one.
    """

    def __init__(self, restarts: int = 0):
        self._name = f"jaxlora-lifeline-{uuid.uuid4().hex}"
        self.environment = {NAME: self._name, RESTARTS: str(restarts)}
        self.failure: str | None = None
        """Why an engine has stopped, once one has."""
        self.crashed = False
        """Whether it was a crash: then Triton waits in vain for that model to end."""
        self._changed = threading.Condition()
        self._members: set[socket.socket] = set()
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def open(self) -> None:
        """Takes connections from now on."""
        self._listening.bind(f"\0{self._name}")
        self._listening.listen()
        threading.Thread(target=self._accept, name="lifeline", daemon=True).start()

    def members(self) -> int:
        """How many models hold an engine now."""
        return len(self._members)

    def drain(self, timeout_s: float) -> None:
        """Asks every model to take no more and finish what it has; returns when all have, or after `timeout_s` seconds."""
        with self._changed:
            for member in self._members:
                try:
                    member.sendall(f"{_DRAIN}\n".encode())
                except OSError:
                    pass  # it has just ended, and will be taken out
            self._changed.wait_for(lambda: not self._members, timeout_s)

    def close(self) -> None:
        """Takes no more connections."""
        self._listening.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the thread
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                member, _ = self._listening.accept()
            except OSError:
                return
            with self._changed:
                self._members.add(member)
                self._changed.notify_all()
            threading.Thread(target=self._listen, args=(member,), daemon=True).start()

    def _listen(self, member: socket.socket) -> None:
        with member, member.makefile("r", encoding="utf-8") as lines:
            try:
                word, _, reason = next(lines, "").strip().partition(" ")
            except OSError:
                word = reason = ""
            with self._changed:
                if not word:
                    self.crashed, self.failure = True, "the process of the model has ended"
                elif word == _STOPPED:
                    self.failure = reason
                self._members.discard(member)
                self._changed.notify_all()


class Member:
    """A model's end.

    Arguments:
        drain: finishes what there is; called in a thread of its own when the launcher asks.
    """

    def __init__(self, drain: Callable[[], None], environ: Mapping[str, str] = os.environ):
        self._drain = drain
        self._socket: socket.socket | None = None
        if NAME in environ:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.connect(f"\0{environ[NAME]}")
            threading.Thread(target=self._listen, name="lifeline", daemon=True).start()

    def stopped(self, reason: str) -> None:
        """The engine has stopped by itself."""
        self._say(f"{_STOPPED} {' '.join(reason.split())}")

    def close(self) -> None:
        """The model is unloaded as it should be."""
        self._say(_BYE)

    def _listen(self) -> None:
        with self._socket.makefile("r", encoding="utf-8") as lines:
            try:
                asked = next(lines, "").strip() == _DRAIN
            except OSError:
                asked = False
        if asked:
            self._drain()
            self._say(_DRAINED)

    def _say(self, text: str) -> None:
        if self._socket is not None:
            try:
                self._socket.sendall(f"{text}\n".encode())
            except OSError:
                pass  # the launcher has ended; the server soon will


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """How many servers the launcher had started before this one, whose engines stopped."""
    return int(environ.get(RESTARTS, "0"))
