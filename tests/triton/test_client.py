"""The client against a real Triton, and that a client without a server gives the same."""

import asyncio
import dataclasses
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from client import AsyncClient, Client, LocalClient, ServerUnreachable
from jaxlora.adapters import publish
from jaxlora.errors import AdapterNotFound, Cancelled, InvalidRequest, RequestTimeout, ServingError
from jaxlora.settings import Settings
from server import preflight
from server.repository import PROJECT

from ..parity import checkpoints
from .harness import serving, write_byte_tokenizer

ADAPTERS = {"alice/sql": "attention", "bob/poems": "every-linear"}
# Long enough that an answer of this length takes many seconds.
LONG = 16_000
LIMITS = {"max_slots": 2, "max_seq_len": 16_384, "max_output_tokens": LONG, "lora_slots": 4, "max_lora_rank": 16}

REQUESTS = {
    "greedy": ("Hello", {"max_tokens": 12}),
    "adapter": ("Hello", {"max_tokens": 12, "adapter": "alice/sql"}),
    "pinned": ("Hello", {"max_tokens": 12, "adapter": "bob/poems@1"}),
    "sampled": ("Hi there", {"max_tokens": 20, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "seed": 2**64 - 1}),
    "penalties": ("Aa", {"max_tokens": 20, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": -0.1}),
    "logprobs": ("Hello", {"max_tokens": 6, "logprobs": 3}),
    "echo": ("Hello", {"max_tokens": 6, "exclude_input_in_output": False}),
    "not ascii": ("naïve 你好 🙂", {"max_tokens": 8, "adapter": "bob/poems"}),
    "messages": ([{"role": "user", "content": "Hello 🙂"}], {"max_tokens": 8, "adapter": "alice/sql"}),
}
REFUSED = {
    "unknown adapter": ("x", {"adapter": "alice/nothing"}),
    "unknown version": ("x", {"adapter": "alice/sql@9"}),
    "malformed adapter": ("x", {"adapter": "../../etc"}),
    "long adapter": ("x", {"adapter": "a" * 10_000}),
    "several fields": ("x", {"max_tokens": 0, "top_p": 2, "temperature": float("nan")}),
    "not a number": ("x", {"temperature": "warm"}),
    "unknown field": ("x", {"nonsense": 1}),
    "empty": ("", {}),
    "empty messages": ([], {}),
    "bad messages": ([{"role": "user"}], {}),
    "surrogate": ("\ud800", {}),
    "too long": ("x" * 20_000, {}),
    "too many tokens": ("x", {"max_tokens": 10**12}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_byte_tokenizer(checkpoints.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LIMITS["max_seq_len"]}))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    cache = Settings.read().cache_dir  # with the compiled kernels
    with serving(tmp_path_factory.mktemp("client"), model=str(model), cache_dir=cache, **LIMITS) as started:
        for name, variant in ADAPTERS.items():
            publish(
                checkpoints.write_adapter(tmp_path_factory.mktemp("adapter") / "folder", "llama", variant), name, started.store
            )
        with Client(started.grpc_url) as client:
            client.load_adapters()
        yield started


@pytest.fixture(scope="module")
def local(server):
    with LocalClient(server.settings, server.store) as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    with Client(server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def front_door(server):
    with Client(server.grpc_url, model="llm") as client:
        yield client


def outcome(client, prompt, arguments, stream=False):
    """A completion, or the error with all it says."""
    try:
        return client.stream(prompt, **arguments).completion() if stream else client.generate(prompt, **arguments)
    except ServingError as error:
        return type(error), str(error), getattr(error, "problems", None)


@pytest.mark.parametrize("name", [*REQUESTS, *REFUSED])
def test_a_server_and_this_process_give_the_same(client, front_door, local, name):
    prompt, arguments = (REQUESTS | REFUSED)[name]
    expected = outcome(local, prompt, arguments)
    assert isinstance(expected, tuple) == (name in REFUSED), expected
    for each in (local, client, front_door):
        assert outcome(each, prompt, arguments, stream=True) == expected
        assert outcome(each, prompt, arguments) == expected


def test_an_answer_says_what_it_took(client, local):
    for each in (client, local):
        completion = each.generate("Hello", max_tokens=5, adapter="alice/sql", ignore_eos=True)
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 5)
        assert completion.adapter == "alice/sql@1" and completion.finish_reason == "length"
        assert completion.metrics["ttft_ms"] > 0 and len(completion.metrics["adapter_sha256"]) == 64


def test_a_stream_comes_in_pieces(client, local):
    for each in (client, local):
        chunks = list(each.stream("Hello", max_tokens=200, ignore_eos=True))
        assert len(chunks) > 3 and [bool(chunk.end) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_the_catalogue_is_the_same(client, local):
    assert {adapter.name for adapter in client.adapters()} == set(ADAPTERS)
    assert client.adapters() == local.adapters()
    assert client.adapters(user="bob") == local.adapters(user="bob")
    (adapter,) = client.adapters(name="bob/poems")
    assert adapter.serving == 1 and adapter.version(1).is_ready and adapter.version(1).rank == 16


@pytest.mark.parametrize("query", [{"name": "alice/nothing"}, {"name": "../x"}, {"user": "../x"}, {"name": "a/b", "user": "a"}])
def test_a_question_to_the_catalogue_is_refused_alike(client, local, query):
    errors = []
    for each in (client, local):
        with pytest.raises((InvalidRequest, AdapterNotFound)) as caught:
            each.adapters(**query)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_one_client_serves_many_threads(client, local):
    work = [(prompt, arguments) for prompt, arguments in (*REQUESTS.values(), *list(REFUSED.values())[:3])] * 4
    with ThreadPoolExecutor(24) as threads:
        found = list(threads.map(lambda request: outcome(client, *request, stream=True), work))
    assert found == [outcome(local, *request) for request in work]


@pytest.mark.parametrize("adapter", [None, "alice/sql"])
def test_the_example_of_the_readme_runs_as_it_stands_and_with_its_adapter(server, client, capsys, adapter):
    (example,) = re.findall(r"```python\n(from client import Client\n.*?)```", (PROJECT / "README.md").read_text(), re.S)
    assert "localhost:8001" in example and "max_tokens=24):  # adapter=\"alice/sql\" once" in example
    if adapter:
        example = example.replace("max_tokens=24):", f"max_tokens=24, adapter={adapter!r}):")
    exec(example.replace("localhost:8001", server.grpc_url), {})
    streamed = client.generate("The capital of France is", adapter=adapter, max_tokens=24)
    chat = client.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert capsys.readouterr().out == f"{streamed.text}{chat.text} {chat.adapter} {chat.usage.completion_tokens}\n"


def test_the_asynchronous_client_gives_the_same(server, local):
    async def all_at_once():
        async with AsyncClient(server.grpc_url) as client:
            await client.load_adapters()

            async def one(prompt, arguments, stream):
                try:
                    return await (
                        client.stream(prompt, **arguments).completion() if stream else client.generate(prompt, **arguments)
                    )
                except ServingError as error:
                    return type(error), str(error), getattr(error, "problems", None)

            return await asyncio.gather(
                *(one(*request, stream) for request in work for stream in (True, False))
            ), await client.adapters()

    work = [*REQUESTS.values(), *REFUSED.values()]
    found, adapters = asyncio.run(all_at_once())
    assert found == [answer for request in work for answer in [outcome(local, *request)] * 2]
    assert adapters == local.adapters()


def answers_at_once(client) -> bool:
    """Whether a slot is free: an answer takes milliseconds, and else waits for many seconds."""
    started = time.monotonic()
    client.generate("x", max_tokens=2)
    return time.monotonic() - started < 1


@pytest.mark.parametrize("how", ["close", "break", "with", "other thread"])
@pytest.mark.parametrize("place", ["client", "local"])
def test_a_stream_that_is_left_frees_its_slot(request, place, how):
    client = request.getfixturevalue(place)
    for _ in range(LIMITS["max_slots"]):
        stream = client.stream("Hello", max_tokens=LONG, ignore_eos=True)
        if how == "break":
            for _ in stream:
                break
            del stream
        elif how == "with":
            with stream:
                next(stream)
        elif how == "close":
            next(stream)
            stream.close()
            assert list(stream) == []
        else:
            threading.Timer(0.2, stream.close).start()
            with pytest.raises(Cancelled):
                stream.completion()
    assert answers_at_once(client)


def test_leaving_an_asynchronous_stream_frees_its_slot(server, client):
    async def leave():
        async with AsyncClient(server.grpc_url) as client:
            async with client.stream("Hello", max_tokens=LONG, ignore_eos=True) as stream:
                await anext(stream)
            waiting = asyncio.create_task(client.generate("Hello", max_tokens=LONG, ignore_eos=True))
            await asyncio.sleep(0.3)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            abandoned = client.stream("Hello", max_tokens=LONG, ignore_eos=True)
            await anext(abandoned)
        with pytest.raises(Cancelled):  # closing the client has ended it
            await abandoned.completion()

    asyncio.run(leave())
    assert answers_at_once(client)


def test_a_time_out_ends_a_request(client, front_door, local):
    for each in (client, front_door, local):
        with pytest.raises(RequestTimeout, match=r"time-out of 0.3 s passed after \d+ tokens"):
            each.generate("Hello", max_tokens=LONG, ignore_eos=True, timeout_s=0.3)
    assert answers_at_once(client)


def test_no_server_is_told_with_its_address(server):
    url = f"127.0.0.1:{preflight.free_ports(1)[0]}"
    with Client(url) as client:
        for call in (client.adapters, client.load_adapters, client.is_ready, lambda: client.generate("x")):
            with pytest.raises(ServerUnreachable, match=f"{url}.*make serve"):
                call()


def test_a_model_that_is_not_there_is_no_answer(server):
    with Client(server.grpc_url, model="nothing") as client, pytest.raises(ServingError, match="nothing"):
        client.generate("x")


def test_new_adapters_are_live_in_process_too(server, local, tmp_path):
    local_store = tmp_path / "store"
    local_store.mkdir()
    settings = dataclasses.replace(server.settings, max_slots=1)
    with LocalClient(settings, local_store) as client:
        assert client.adapters() == []
        publish(checkpoints.write_adapter(tmp_path / "adapter", "llama", "attention"), "alice/sql", local_store)
        client.load_adapters()
        prompt, arguments = REQUESTS["adapter"]
        assert client.generate(prompt, **arguments) == local.generate(prompt, **arguments)
