"""What a server says becomes the error that the service raised, with a server that only plays one."""

import concurrent.futures
import math
import threading

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from client import Client, ServerUnreachable, errors
from jaxlora.errors import (
    AdapterInvalid,
    AdapterNotFound,
    Cancelled,
    EngineError,
    InvalidRequest,
    RequestTimeout,
    ServingError,
    Unavailable,
)

RAISED = [
    AdapterNotFound("alice/x: no such adapter; alice has: sql"),
    InvalidRequest({"max_tokens": "0 is not between 1 and 2048 (MAX_OUTPUT_TOKENS)"}),
    InvalidRequest(
        {"top_p": "2 is over: 1; too much", "messages": "[0] has no `role`, [1] has no `role`", "query": "is no JSON"}
    ),
    InvalidRequest({"something": "that this client does not know"}),
    Unavailable("the queue is full: 256 requests wait for a slot (MAX_QUEUE)", 1.5),
    Unavailable("the server is shutting down"),
    RequestTimeout("the request's time-out of 0.5 s passed after 12 tokens"),
    RequestTimeout("no slot came free in 120.0 s; the limit is 120 s (QUEUE_TIMEOUT_S)"),
    Cancelled("the request was cancelled"),
    EngineError("the model's logits are not finite"),
    EngineError("it broke: INTERNAL: twice\nand over two lines"),
]


@pytest.mark.parametrize("before", ["", "in ensemble 'llm', "])
@pytest.mark.parametrize("raised", RAISED, ids=str)
def test_an_error_comes_back_as_it_was_raised(raised, before):
    found = errors.from_text(f"{before}{raised.name}: {raised}")
    assert type(found) is type(raised) and str(found) == str(raised)
    assert vars(found) == vars(raised)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[request id: 1] expected 1 inputs but got 2", EngineError),
        ("unexpected shape for input 'stream'", EngineError),
        ("UNHEARD_OF: a code of a newer server", EngineError),
        ("Request for unknown model: 'llm' is not found", Unavailable),
    ],
)
def test_what_triton_says_itself_stays_readable(text, kind):
    found = errors.from_text(text)
    assert type(found) is kind and text in str(found)


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with what a test puts into `stream` and `unary`: responses, error texts, or (code, details) to abort with."""

    def __init__(self):
        self.stream, self.unary = [], pb.ModelInferResponse()
        self.requests, self.metadata = [], []
        self.ended = threading.Event()

    def ModelStreamInfer(self, request_iterator, context):
        self.requests.append(next(request_iterator))
        self.metadata.append(dict(context.invocation_metadata()))
        context.add_callback(self.ended.set)
        for answer in self.stream:
            if isinstance(answer, tuple):
                context.abort(*answer)
            if answer == "wait":
                self.ended.wait(10)
                return
            yield answer

    def ModelInfer(self, request, context):
        self.metadata.append(dict(context.invocation_metadata()))
        if isinstance(self.unary, tuple):
            context.abort(*self.unary)
        return self.unary

    def RepositoryModelLoad(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if isinstance(self.unary, tuple):
            context.abort(*self.unary)
        return pb.RepositoryModelLoadResponse()


@pytest.fixture
def triton():
    fake = FakeTriton()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    fake.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield fake
    server.stop(None)


def text_response(text):
    response = pb.ModelStreamInferResponse()
    raw = text.encode()
    response.infer_response.outputs.add(name="text_output", datatype="BYTES", shape=[1, 1])
    response.infer_response.raw_output_contents.append(len(raw).to_bytes(4, "little") + raw)
    return response


def test_an_error_in_the_middle_of_a_stream_comes_after_what_was_before_it(triton):
    triton.stream = [text_response("one "), pb.ModelStreamInferResponse(error_message="INTERNAL: it broke")]
    with Client(triton.url) as client:
        stream = client.stream("x")
        assert next(stream).text == "one "
        with pytest.raises(EngineError, match="^it broke$"):
            next(stream)
        assert list(stream) == []


def test_no_proxy_is_asked_for_a_server_on_this_machine(triton, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    triton.stream = [text_response("a"), pb.ModelStreamInferResponse(error_message="INTERNAL: x")]
    with Client(triton.url) as client, pytest.raises(EngineError, match="x"):
        client.generate("x")


@pytest.mark.parametrize("timeout_s", [math.inf, math.nan, 1e300])
def test_a_time_out_that_cannot_be_sent_is_told(triton, timeout_s):
    with Client(triton.url) as client, pytest.raises(InvalidRequest, match="timeout_s: .* is not under"):
        client.generate("x", timeout_s=timeout_s)


def test_an_answer_that_breaks_off_is_no_answer(triton):
    triton.stream = [text_response("one ")]
    with Client(triton.url) as client:
        with pytest.raises(EngineError, match="broke off"):
            client.generate("x")
        with pytest.raises(EngineError, match="broke off"):
            list(client.stream("x"))


def test_a_connection_that_is_lost_is_told(triton):
    triton.stream = [text_response("one "), (grpc.StatusCode.UNAVAILABLE, "Socket closed")]
    with Client(triton.url) as client, pytest.raises(ServerUnreachable, match=triton.url):
        client.generate("x")


def test_closing_a_stream_cancels_the_call(triton):
    triton.stream = [text_response("one "), "wait"]
    with Client(triton.url) as client:
        stream = client.stream("x")
        next(stream)
        assert not triton.ended.is_set()
        stream.close()
        assert triton.ended.wait(5)
        with pytest.raises(Cancelled):
            stream.completion()


def test_dropping_a_stream_cancels_the_call(triton):
    triton.stream = [text_response("one "), "wait"]
    with Client(triton.url) as client:
        for _ in client.stream("x"):
            break
        assert triton.ended.wait(5)


def test_a_server_that_hangs_is_given_up_after_the_time_out(triton, monkeypatch):
    monkeypatch.setattr("client.wire.GRACE_S", 0.1)
    triton.stream = ["wait"]
    with Client(triton.url) as client, pytest.raises(RequestTimeout):
        client.generate("x", timeout_s=0.2)
    assert triton.requests[0].parameters["timeout"].int64_param == 200_000


def test_every_call_carries_the_headers(triton):
    triton.unary = (grpc.StatusCode.NOT_FOUND, "NOT_FOUND: nothing")
    with Client(triton.url, headers={"triton-grpc-protocol-key": "secret"}) as client:
        for call in (lambda: client.generate("x"), client.adapters, client.load_adapters):
            with pytest.raises(ServingError):
                call()
    assert [metadata.get("triton-grpc-protocol-key") for metadata in triton.metadata] == ["secret"] * 3


@pytest.mark.parametrize(
    ("code", "details", "kind", "message"),
    [
        (grpc.StatusCode.NOT_FOUND, "NOT_FOUND: alice/x: no such adapter", AdapterNotFound, "alice/x: no such adapter"),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARG: query: is no JSON", InvalidRequest, "query: is no JSON"),
        (
            grpc.StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host: Connection refused",
            ServerUnreachable,
            "no server answers at [0-9.:]+: Connection refused .*make serve",
        ),
        (
            grpc.StatusCode.UNAVAILABLE,
            "Request for unknown model: 'adapters' is not found",
            Unavailable,
            "not ready.*'adapters' is not found",
        ),
        (grpc.StatusCode.UNAVAILABLE, "", ServerUnreachable, "no server answers at [0-9.:]+: no reason given .*make serve"),
        (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE: the server is shutting down", Unavailable, "^the server is shutting down$"),
        (grpc.StatusCode.UNKNOWN, "", EngineError, "UNKNOWN"),
    ],
)
def test_a_call_that_fails_tells_why(triton, code, details, kind, message):
    triton.unary = (code, details)
    with Client(triton.url) as client, pytest.raises(ServingError, match=message) as caught:
        client.adapters()
    assert caught.type is kind


def test_a_refused_load_gives_the_reason_without_a_traceback(triton):
    reason = "alice/sql@2: use_dora: is not supported; r: 3 is not 4\nbob/x@1: NaN"
    triton.unary = (
        grpc.StatusCode.INTERNAL,
        "load failed for model 'adapters': version 1 is at UNAVAILABLE state: Internal: TritonModelException: "
        f"{reason}\n\nAt:\n  model.py(9): initialize\n;\n",
    )
    with Client(triton.url) as client, pytest.raises(AdapterInvalid) as caught:
        client.load_adapters()
    assert str(caught.value) == reason
    assert triton.requests[0].model_name == "adapters"
