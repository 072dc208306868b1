"""The `adapters` model in a real Triton: publishing by `load`, refusing by 400, and what a query answers."""

import itertools
import json
import os
import pathlib
import shutil
import threading
import time

import numpy as np
import pytest

from jaxlora.adapters import AdapterName, publish, write_policy

from ..parity import checkpoints
from .harness import Http, Refused, serving

MODELS = ("adapters",)
_USERS = itertools.count()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = checkpoints.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "llama")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return checkpoints.write_adapter(tmp_path_factory.mktemp("good") / "adapter", "llama", "attention")


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    with serving(tmp_path_factory.mktemp("adapters"), models=MODELS, model=str(model)) as started:
        yield started


@pytest.fixture
def http(server):
    return Http(server)


@pytest.fixture
def user():
    """A user of the test's own."""
    return f"user{next(_USERS)}"


def ask(http: Http, **query: str) -> dict:
    body = {"inputs": [{"name": "query", "shape": [1], "datatype": "BYTES", "data": [json.dumps(query)]}]}
    answer = http.post_raw("/v2/models/adapters/infer", json.dumps(body).encode())
    return json.loads(answer["outputs"][0]["data"][0])


def damaged(good: pathlib.Path, folder: pathlib.Path, **config) -> pathlib.Path:
    """A copy of an adapter whose config says something else."""
    shutil.copytree(good, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def served(http: Http, name: str) -> int | None:
    """The version that answers to a name."""
    (adapter,) = ask(http, name=name)["adapters"]
    return adapter["serving"]


def test_a_published_adapter_is_live_after_load(http, server, good, user):
    assert publish(good, f"{user}/sql", server.store) == 1
    with pytest.raises(Refused, match=f"{user}/sql"):
        ask(http, name=f"{user}/sql")
    http.load("adapters")
    assert served(http, f"{user}/sql") == 1
    assert publish(good, f"{user}/sql", server.store) == 2
    http.load("adapters")
    assert served(http, f"{user}/sql") == 2


def test_a_bad_version_is_refused_with_every_reason_and_nothing_changes(http, server, good, user, tmp_path):
    publish(good, f"{user}/sql", server.store)
    http.load("adapters")
    publish(damaged(good, tmp_path / "bad", use_dora=True, bias="all", r=3), f"{user}/sql", server.store)
    with pytest.raises(Refused) as refused:
        http.load("adapters")
    text = str(refused.value)
    assert refused.value.status == 400
    assert f"{user}/sql@2" in text and "use_dora" in text and "bias" in text
    assert http.is_ready() and served(http, f"{user}/sql") == 1


def test_a_refusal_tells_nothing_about_the_servers_disk(http, server, good, user, tmp_path):
    publish(damaged(good, tmp_path / "bad", use_dora=True), f"{user}/sql", server.store)
    with pytest.raises(Refused) as refused:
        http.load("adapters")
    assert "/" not in str(refused.value).replace(f"{user}/sql", "")


def test_a_bad_version_does_not_hold_back_a_good_one(http, server, good, user, tmp_path):
    publish(damaged(good, tmp_path / "bad", use_dora=True), f"{user}/bad", server.store)
    publish(good, f"{user}/good", server.store)
    with pytest.raises(Refused, match=f"{user}/bad@1"):
        http.load("adapters")
    assert served(http, f"{user}/good") == 1


def test_rolling_back_is_the_same_road(http, server, good, user):
    for _ in range(2):
        publish(good, f"{user}/sql", server.store)
    write_policy(server.store, AdapterName(user, "sql"), 1)
    http.load("adapters")
    assert served(http, f"{user}/sql") == 1
    write_policy(server.store, AdapterName(user, "sql"), "latest")
    http.load("adapters")
    assert served(http, f"{user}/sql") == 2


def test_weights_that_are_not_finite_are_refused(http, server, good, user, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = damaged(good, tmp_path / "bad")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = np.where(np.arange(tensors[name].size).reshape(tensors[name].shape) == 5, np.nan, tensors[name])
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    publish(folder, f"{user}/sql", server.store)
    with pytest.raises(Refused, match=r"(?i)nan|finite"):
        http.load("adapters")


def test_a_file_with_a_time_to_come_holds_up_no_publish(http, server, good, user):
    early = server.store / "users" / user / "copied"
    early.parent.mkdir()
    early.write_text("")
    os.utime(early, (time.time() + 86_400,) * 2)
    for version in (1, 2, 3):
        assert publish(good, f"{user}/sql", server.store) == version
        http.load("adapters")
        assert served(http, f"{user}/sql") == version
    early.unlink()
    publish(good, f"{user}/sql", server.store)
    http.load("adapters")
    assert served(http, f"{user}/sql") == 4


def test_what_is_told_of_an_adapter_may_hold_any_letter(http, server, good, user, tmp_path):
    publish(damaged(good, tmp_path / "bad", target_modules="größe("), f"{user}/sql", server.store)
    with pytest.raises(Refused, match=f"{user}/sql@1: .*target_modules"):
        http.load("adapters")
    assert "größe(" in server.log_path.read_text()


def test_an_unfinished_publish_is_invisible(http, server, good, user):
    publish(good, f"{user}/sql", server.store)
    shutil.copytree(good, server.store / "users" / user / "adapters" / "sql" / "2.incoming-1-abc")
    http.load("adapters")
    assert served(http, f"{user}/sql") == 1


@pytest.mark.parametrize("query", ["{", "[]", '{"user": 3}', '{"nope": 1}', '{"name": "../../etc/passwd"}', '{"user": "../x"}', "x" * 10_000])
def test_a_bad_query_is_refused_by_name(http, query):
    body = {"inputs": [{"name": "query", "shape": [1], "datatype": "BYTES", "data": [query]}]}
    with pytest.raises(Refused) as refused:
        http.post_raw("/v2/models/adapters/infer", json.dumps(body).encode())
    assert len(str(refused.value)) < 500
    assert "adapters" in ask(http)


def test_queries_are_answered_while_adapters_are_published(http, server, good, user):
    publish(good, f"{user}/sql", server.store)
    http.load("adapters")
    done, failures, answers = threading.Event(), [], []

    def keep_asking():
        while not done.is_set():
            try:
                answers.append(served(http, f"{user}/sql"))
            except Exception as error:
                failures.append(error)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        for _ in range(4):
            publish(good, f"{user}/sql", server.store)
            http.load("adapters")
    finally:
        done.set()
        asking.join()
    assert not failures
    assert answers == sorted(answers) and answers[0] == 1 and served(http, f"{user}/sql") == 5


def test_a_server_killed_while_it_publishes_starts_again_with_what_was_good(tmp_path, model, good):
    with serving(tmp_path, models=MODELS, model=str(model)) as server:
        publish(good, "alice/sql", server.store)
        Http(server).load("adapters")
        for number in range(20):
            publish(good, f"alice/more{number}", server.store)
        loading = threading.Thread(target=lambda: pytest.raises((Refused, OSError), Http(server).load, "adapters"))
        loading.start()
        server.kill()
        loading.join()
    # As a writer that was killed leaves it.
    shutil.copytree(good, server.store / "users" / "alice" / "adapters" / "sql" / "2.incoming-1-abc")
    os.truncate(server.store / "users" / "alice" / "adapters" / "sql" / "2.incoming-1-abc" / "adapter_model.safetensors", 100)
    with serving(tmp_path, models=MODELS, model=str(model)) as server:
        http = Http(server)
        assert served(http, "alice/sql") == 1
        assert {served(http, f"alice/more{number}") for number in range(20)} == {1}
