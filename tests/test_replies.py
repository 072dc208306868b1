"""The last response of a request: it excludes the question whether the client went away, and leaves nothing in Triton's shared memory."""

import importlib.util
import sys
import threading
import types
import weakref

import pytest

from jaxlora.errors import EngineError
from jaxlora.service.answers import Ending
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
    flushing = threading.Thread(target=reply.flush)
    flushing.start()
    flushing.join(0.2)
    assert sender.events == ["asked"]
    sender.answer.set()
    asking.join(10)
    flushing.join(10)
    assert sender.events == ["asked", "answered", "last"]
    assert not reply.cancelled() and sender.events[-1] == "last"


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
    reply.flush()
    assert alive() is None and reply.closed and not reply.cancelled()


def test_a_closed_sender_keeps_no_tensor(replies):
    first = replies._unfinished()
    assert replies._unfinished() is first
    replies.Sender(0.0).close()
    assert replies._unfinished() is not first
