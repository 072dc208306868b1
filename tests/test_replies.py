"""Responses on their way out: the last one excludes the question whether the client went away, and leaves nothing in Triton's shared memory;
one that can't be sent holds back no other."""

import importlib.util
import sys
import threading
import types
import weakref

import pytest

from jaxlora.errors import EngineError
from jaxlora.service.answers import Ending, Piece
from server.repository import PROJECT


class ResponseSender:
    """Holds the question open until it may be answered."""

    def __init__(self):
        self.events: list[str] = []
        self.asked, self.answer = threading.Event(), threading.Event()

    def is_cancelled(self) -> bool:
        self.events.append("asked")
        self.asked.set()
        assert self.answer.wait(10)
        self.events.append("answered")
        return False

    def send(self, response, flags=0) -> None:
        self.events.append("last" if flags else "sent")


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    fake = types.ModuleType("triton_python_backend_utils")
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    fake.Tensor = fake.TritonError = lambda *values: values
    fake.TritonError.INTERNAL = fake.TritonError.UNAVAILABLE = 0
    fake.InferenceResponse = lambda *values, **named: values
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    spec = importlib.util.spec_from_file_location("replies_under_test", PROJECT / "model_repository/jax_lora/1/replies.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Triton loads a model again whose folder changes
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fails", [False, True])
def test_the_last_response_waits_for_the_question_and_none_comes_after_it(replies, fails):
    sender, queue = ResponseSender(), types.SimpleNamespace(enqueue=lambda each: None)
    reply = replies.Replies(sender, queue, 1, True)
    asking = threading.Thread(target=reply.cancelled)
    asking.start()
    assert sender.asked.wait(10)
    if fails:
        reply.failed(EngineError("no more"))
    else:
        reply._rows[0].end(Ending("", "length", 1, 1, "", 0, {}))
    sending = threading.Thread(target=reply.take())
    sending.start()
    sending.join(0.2)
    assert sender.events == ["asked"]
    sender.answer.set()
    asking.join(10)
    sending.join(10)
    assert sender.events == ["asked", "answered", "last"]
    assert not reply.cancelled() and sender.events[-1] == "last"


def test_a_stream_that_fails_sends_first_what_it_had_held_back(replies):
    sender, queue = ResponseSender(), types.SimpleNamespace(enqueue=lambda each: None)
    reply = replies.Replies(sender, queue, 1, True)
    reply._rows[0].piece(Piece("a", ()))
    reply.failed(EngineError("no more"))
    reply.take()()
    assert sender.events == ["sent", "last"]


@pytest.mark.parametrize("then", ["goes on", "is refused"])
def test_a_row_that_fails_while_others_are_started_is_the_answer_and_nothing_runs_on(replies, then):
    sender, queue = ResponseSender(), types.SimpleNamespace(enqueue=lambda each: None)
    reply = replies.Replies(sender, queue, 4, False)
    cancelled, started = [], []

    def start(row):
        started.append(row)
        return types.SimpleNamespace(cancel=lambda: cancelled.append(row))

    def start_while_the_first_fails(row):
        handle = start(row)
        reply.failed(EngineError("no more"))
        if then == "is refused":
            raise EngineError("full")
        return handle

    reply.start([start, start, start_while_the_first_fails, start])
    assert len(started) == 3 and set(cancelled) >= set(started if then == "goes on" else started[:2])
    reply.take()()
    assert sender.events == ["last"] and reply.take() is None


@pytest.mark.parametrize("ends", ["finished", "failed", "refused"])
def test_what_lies_in_shared_memory_goes_with_the_last_response(replies, ends):
    def refuse(row):
        raise EngineError("not today")

    sender, queue = ResponseSender(), types.SimpleNamespace(enqueue=lambda each: None)
    alive = weakref.ref(sender)
    reply = replies.Replies(sender, queue, 1, True)
    del sender
    if ends == "refused":
        with pytest.raises(EngineError):
            reply.start([refuse])
    elif ends == "failed":
        reply.failed(EngineError("no more"))
    else:
        reply._rows[0].end(Ending("", "length", 1, 1, "", 0, {}))
    if ends != "refused":
        reply.take()()
    assert reply.take() is None and alive() is None and reply.closed and not reply.cancelled()


def test_a_response_that_cannot_be_sent_holds_back_no_other(replies):
    senders = [ResponseSender() for _ in range(3)]
    handles = [types.SimpleNamespace(cancelled=0) for _ in senders]
    for handle in handles:
        handle.cancel = lambda handle=handle: setattr(handle, "cancelled", handle.cancelled + 1)

    def fail(response, flags=0):
        raise RuntimeError("the client is gone")

    senders[1].send = fail
    queue = replies.Sender(1e9)
    streams = [replies.Replies(sender, queue, 1, True) for sender in senders]
    for stream, handle in zip(streams, handles):
        stream.start([lambda row, handle=handle: handle])
    for stream in streams:
        stream._rows[0].piece(Piece("a", ()))
    for stream in streams:
        stream._rows[0].end(Ending("b", "length", 1, 2, "", 0, {}))
    queue.close()
    assert [sender.events[-1:] for sender in senders] == [["last"], [], ["last"]]
    assert [bool(handle.cancelled) for handle in handles] == [False, True, False] and all(stream.closed for stream in streams)


def test_a_closed_sender_keeps_no_tensor(replies):
    first = replies._unfinished()
    assert replies._unfinished() is first
    replies.Sender(0.0).close()
    assert replies._unfinished() is not first
