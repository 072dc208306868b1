"""A server with a key: what changes it is refused without the key and done with it; answering needs none."""

import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc
from safetensors.numpy import load_file, save_file
from tritonclient.utils import InferenceServerException

from client import Client, ServerUnreachable
from client import adapters as command
from client.errors import AccessDenied
from jaxlora.adapters import AdapterName
from jaxlora.adapters.store import version_path
from jaxlora.errors import AdapterInvalid
from server import access
from training.publishing import publish_and_verify

from .conftest import ADMIN_KEY
from .harness import Http, Refused

POSTS = ("/v2/repository/models/adapters/load", "/v2/repository/index", "/v2/trace/setting", "/v2/logging")
GETS = ("/v2/trace/setting", "/v2/logging", "/v2/systemsharedmemory/status", "/v2/cudasharedmemory/status")


def status(server, method: str, path: str, **headers: str) -> int:
    request = urllib.request.Request(server.http_url + path, b"{}" if method == "POST" else None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(("method", "path"), [*(("POST", path) for path in POSTS), *(("GET", path) for path in GETS)])
def test_over_http_what_changes_the_server_asks_for_the_key(operated, method, path):
    assert status(operated, method, path) == 403
    assert status(operated, method, path, **{access.HTTP_HEADER: ADMIN_KEY[:-1]}) == 403
    if "cuda" not in path:  # there is none in this build
        assert status(operated, method, path, **{access.HTTP_HEADER: ADMIN_KEY}) == 200


@pytest.mark.parametrize("call", ["get_model_repository_index", "get_trace_settings", "get_log_settings", "get_system_shared_memory_status"])
def test_over_grpc_what_changes_the_server_asks_for_the_key(operated, call):
    with tritonclient.grpc.InferenceServerClient(operated.grpc_url) as client:
        for headers in ({}, {access.GRPC_HEADER: "wrong"}):
            with pytest.raises(InferenceServerException, match="restricted"):
                getattr(client, call)(headers=headers)
        getattr(client, call)(headers={access.GRPC_HEADER: ADMIN_KEY})


def test_answering_and_looking_need_no_key(operated):
    assert status(operated, "GET", "/v2/health/ready") == status(operated, "GET", "/v2/models/llm") == 200
    assert Http(operated).generate(text_input="hi", max_tokens=2)["num_output_tokens"] == 2
    with Client(operated.grpc_url) as client:
        assert client.adapters(user="alice") and client.is_ready()
        with pytest.raises(AccessDenied, match="wants its key for that: set ADMIN_KEY") as caught:
            client.load_adapters()
        assert not isinstance(caught.value, ServerUnreachable) and ADMIN_KEY not in str(caught.value)


def test_the_command_line_publishes_with_the_key_and_leaves_nothing_behind_without(operated, adapters, monkeypatch, capsys):
    publish = ["publish", str(adapters["alice/attention"]), "--name", "carol/sql", "--store", str(operated.store), "--url", operated.grpc_url]
    monkeypatch.delenv("ADMIN_KEY", raising=False)
    assert command.main(publish) == 1
    assert "set ADMIN_KEY" in capsys.readouterr().err
    assert not version_path(operated.store, AdapterName("carol", "sql", 1)).exists()
    monkeypatch.setenv("ADMIN_KEY", ADMIN_KEY)
    assert command.main(publish) == 0
    assert "is live" in capsys.readouterr().out
    for rest in (["serve", "carol/sql", "--version", "latest"], ["unload", "carol/sql"]):
        assert command.main([*rest, "--store", str(operated.store), "--url", operated.grpc_url]) == 0


def test_training_publishes_with_the_key_and_is_told_without(operated, adapters, monkeypatch):
    name, folder, said = AdapterName("dave", "sql"), adapters["alice/rslora"], []
    monkeypatch.delenv("ADMIN_KEY", raising=False)
    with pytest.raises(AccessDenied):
        publish_and_verify(folder, name, operated.store, operated.grpc_url, "run", said.append)
    monkeypatch.setenv("ADMIN_KEY", ADMIN_KEY)
    version = publish_and_verify(folder, name, operated.store, operated.grpc_url, "run", said.append)
    assert version.unpinned == "dave/sql" and any("answers with it" in line for line in said)


def test_a_bad_adapter_is_refused_with_its_reasons_as_ever(operated, adapters, tmp_path, monkeypatch):
    monkeypatch.setenv("ADMIN_KEY", ADMIN_KEY)
    folder = tmp_path / "bad"
    folder.mkdir()
    for file in adapters["alice/attention"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {name: np.full_like(tensors[name], np.nan)}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterInvalid, match="refused"):
        publish_and_verify(folder, AdapterName("erin", "sql"), operated.store, operated.grpc_url, "run", print)


def test_without_a_key_nothing_is_restricted(server):
    assert access.arguments("") == [] and access.grpc_headers({}) == access.grpc_headers({"ADMIN_KEY": ""}) == {}
    Http(server).load("adapters")


def test_a_refusal_over_http_names_the_header(operated):
    with pytest.raises(Refused, match="restricted, expecting header 'admin-key'"):
        Http(operated).load("adapters")
