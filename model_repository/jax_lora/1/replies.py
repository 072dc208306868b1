"""From the engine's pieces of text to Triton's responses.

The engine's thread only leaves pieces here. One thread sends them, since a response costs about a millisecond of a core, which the engine
would lose; where there are many streams, or one has fallen behind, it gets several tokens in one response (`server.pacing`). Another thread looks for clients that went away.
"""

import functools
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from jaxlora.engine import Handle
from jaxlora.errors import Cancelled, ServingError
from jaxlora.service.answers import Ending, Listener, Piece, logprobs_json
from server import backend
from server.pacing import Pace

WATCH_INTERVAL_S = 0.2


class Row:
    """The listener of one prompt of a request."""

    def __init__(self, replies: "Replies"):
        self._replies = replies
        self.pieces: list[Piece] = []
        self.ending: Ending | None = None

    def piece(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self._replies.progressed()

    def take(self) -> list[Piece]:
        """What has gathered. The list stays the same one, since the engine's thread may be adding to it."""
        taken = self.pieces[:]
        del self.pieces[: len(taken)]
        return taken

    def end(self, ending: Ending) -> None:
        self.ending = ending
        self._replies.ended()

    def failed(self, error: ServingError) -> None:
        self._replies.failed(error)


class Replies:
    """The responses of one request: one after another when it streams, else one when all its rows have ended."""

    def __init__(self, response_sender: Any, sender: "Sender", rows: int, stream: bool):
        self._response_sender, self._sender, self._stream = response_sender, sender, stream
        self._rows = [Row(self) for _ in range(rows)]
        self._open_rows = rows
        self._handles: list[Handle] = []
        self._lock = threading.Lock()
        # The last response deletes what Triton looks at when it is asked whether the client went away: at the same time, the server crashes.
        self._asking = threading.Lock()
        self._queued = self._ready = False
        self._error: ServingError | None = None
        self.closed = False

    def start(self, starts: Sequence[Callable[[Listener], Handle]]) -> None:
        """Starts every row. If one is refused, the others are cancelled and the error is raised. If one fails meanwhile, that is the answer."""
        try:
            for start, row in zip(starts, self._rows, strict=True):
                if self._error is not None:
                    break
                self._handles.append(start(row))
        except Exception:
            with self._lock:
                if refused := self._error is None:
                    self.closed, self._response_sender = True, None
            if refused:
                self.cancel()
                raise
        if self._error is not None:
            self.cancel()

    def cancel(self) -> None:
        """Stops the generation of every row."""
        for handle in self._handles:
            handle.cancel()

    def cancelled(self) -> bool:
        """Whether the client went away before its last response was sent."""
        with self._asking:
            return not self.closed and self._response_sender.is_cancelled()

    def progressed(self) -> None:
        if self._stream:
            self._enqueue()

    def ended(self) -> None:
        with self._lock:
            self._open_rows -= 1
            self._ready = self._open_rows == 0
        if self._ready:
            self._enqueue(last=True)

    def failed(self, error: ServingError) -> None:
        with self._lock:
            first, self._error = self._error is None, self._error or error
        if first:
            self._enqueue(last=True)
            self.cancel()

    def _enqueue(self, last: bool = False) -> None:
        with self._lock:
            if (self._queued and not last) or self.closed:
                return
            self._queued = True
        self._sender.enqueue(self)

    def complete(self) -> bool:
        """Whether what is sent next is the last response."""
        with self._lock:
            return self._ready or self._error is not None

    def take(self) -> Callable[[], None] | None:
        """What has gathered, as a call that sends it. Called by the sender's thread."""
        with self._lock:
            if self.closed:
                return None
            self._queued = False
            error = self._error
            last = self.closed = error is not None or self._ready
            if not (self._stream or last):  # an answer in one piece is not complete yet
                return None
            pieces, response_sender = [row.take() for row in self._rows], self._response_sender
        if error is not None:
            held_back = self._stream and pieces[0] and not isinstance(error, Cancelled)
            return functools.partial(self._send_last, error, partial_response(pieces[0]) if held_back else None)
        if last:
            return functools.partial(self._send_last, final_response(pieces, [row.ending for row in self._rows]))
        return functools.partial(response_sender.send, partial_response(pieces[0])) if pieces[0] else None

    def _send_last(self, last: Any, before: Any = None) -> None:
        with self._asking:
            # It holds shared memory, and crashes the process if it outlives that when the model ends.
            response_sender, self._response_sender = self._response_sender, None
            if before is not None:
                response_sender.send(before)
            if isinstance(last, ServingError):
                backend.send_error(response_sender, last)
            else:
                response_sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def partial_response(pieces: list[Piece]) -> Any:
    """A response in the middle of a stream: only what the client needs now."""
    tensors = [_strings("text_output", ["".join(piece.text for piece in pieces)]), _unfinished()]
    if pieces[0].logprobs:
        tensors.append(_strings("logprobs", [logprobs_json(pieces)]))
    return pb_utils.InferenceResponse(tensors)


def final_response(pieces: list[list[Piece]], endings: list[Ending]) -> Any:
    """The last response, or the only one: one row for each prompt."""
    texts = ["".join(piece.text for piece in row) + ending.text for row, ending in zip(pieces, endings, strict=True)]
    tensors = [
        _strings("text_output", texts),
        _strings("finish_reason", [ending.finish_reason for ending in endings]),
        _numbers("num_input_tokens", [ending.num_input_tokens for ending in endings], np.uint32),
        _numbers("num_output_tokens", [ending.num_output_tokens for ending in endings], np.uint32),
        _strings("adapter_name", [ending.adapter_name for ending in endings]),
        _numbers("adapter_version", [ending.adapter_version for ending in endings], np.uint32),
        _strings("metrics", [json.dumps(ending.metrics) for ending in endings]),
    ]
    if any(ending.cumulative_logprob is not None for ending in endings):
        tensors.append(_numbers("cumulative_logprob", [ending.cumulative_logprob or 0.0 for ending in endings], np.float32))
    if any(piece.logprobs for row in pieces for piece in row):
        tensors.append(_strings("logprobs", [logprobs_json(row) for row in pieces]))
    return pb_utils.InferenceResponse(tensors)


@functools.cache
def _unfinished() -> Any:
    """The same tensor in all of them, as making one takes about as long as sending a response. It holds shared memory: see `flush`."""
    return _strings("finish_reason", [""])


def _strings(name: str, values: list[str]) -> Any:
    return pb_utils.Tensor(name, np.array([[value.encode()] for value in values], dtype=object))


def _numbers(name: str, values: list[Any], dtype: type) -> Any:
    return pb_utils.Tensor(name, np.array(values, dtype).reshape(-1, 1))


class Sender:
    """The one thread that sends responses, in the order in which requests had something to send.

    Arguments:
        rate: see `Pace`.
    """

    def __init__(self, rate: float) -> None:
        self._queue: queue.SimpleQueue[Replies | None] = queue.SimpleQueue()
        self._pace: Pace[Replies] = Pace(rate)
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def enqueue(self, replies: Replies) -> None:
        self._queue.put(replies)

    def close(self) -> None:
        """Sends what is queued, then ends the thread."""
        self._queue.put(None)
        self._thread.join()
        _unfinished.cache_clear()

    def _run(self) -> None:
        closing = False
        while not closing:
            queued = self._wait()
            closing = None in queued
            now = time.monotonic()
            due = self._pace.take(now)
            due += [replies for replies in queued if replies is not None and (replies.complete() or self._pace.due(replies, now))]
            self._send(due)

    def _wait(self) -> list[Replies | None]:
        """What has been queued, or nothing, where it is a waiting stream's turn."""
        queued = []
        try:
            queued.append(self._queue.get(timeout=self._pace.wait(time.monotonic())))
            while True:
                queued.append(self._queue.get_nowait())
        except queue.Empty:
            return queued

    def _send(self, due: list[Replies]) -> None:
        # Made one behind the other, responses cost half as much: while one is sent, generation takes the caches.
        for replies, send in [(replies, self._try(replies, replies.take)) for replies in due]:
            if send is not None:
                self._try(replies, send)
            if replies.closed:
                self._pace.ended(replies)

    @staticmethod
    def _try(replies: Replies, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # a client that is gone must not end the answers of the others
            print(f"jax_lora: a response could not be sent: {error}", flush=True)
            replies.cancel()


class Watcher:
    """Looks for clients that went away, and stops their generation."""

    def __init__(self) -> None:
        self._open: set[Replies] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self._thread.start()

    def watch(self, replies: Replies) -> None:
        with self._lock:
            self._open.add(replies)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(WATCH_INTERVAL_S):
            with self._lock:
                self._open = {replies for replies in self._open if not replies.closed}
                watched = list(self._open)
            for replies in watched:
                if replies.cancelled():
                    replies.cancel()
