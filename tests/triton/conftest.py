"""One server with a tiny random model and eight adapters, shared by the tests of serving."""

import json
import pathlib

import pytest

from jaxlora.adapters import publish
from server.launch import TritonServer

from ..kernels import share_kernels
from ..parity import checkpoints
from .harness import CACHE, Grpc, Http, check_still_runs, serving, write_byte_tokenizer

KINDS = ("attention", "every-linear", "rslora", "patterns")
ADAPTERS = tuple(f"{user}/{kind}" for user in ("alice", "bob") for kind in KINDS)
ADMIN_KEY = "key-of-the-tests-0123456789"
TOKENS_PER_S = 4_000  # in ten seconds room for two of the longest answers, and not for three
SETTINGS = {
    "dtype": "float32",  # what the answers are held to was computed in it
    "max_slots": 8,
    "max_seq_len": 16_384,  # room for answers that take seconds, of which a test wants to see the middle
    "prefill_chunk": 32,
    "lora_slots": 4,  # fewer than there are adapters, so that they are evicted
    "max_lora_rank": 16,
    "max_prompt_bytes": 40_000,
    "max_output_tokens": 16_000,
    "default_max_tokens": 16,
    "max_queue": 64,
}


@pytest.fixture(scope="session", autouse=True)
def shared_kernels() -> None:
    share_kernels(CACHE)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> pathlib.Path:
    """A random Llama of 256 tokens, one for each byte; long answers fit into it."""
    folder = write_byte_tokenizer(checkpoints.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16_384}))
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory) -> dict[str, pathlib.Path]:
    """PEFT folders by adapter name. Bob's have the weights of Alice's, with twice the scale."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for name in ADAPTERS:
        user, kind = name.split("/")
        found[name] = checkpoints.write_adapter(folder / user / kind, "llama", kind)
        if user == "bob":
            path = found[name] / "adapter_config.json"
            config = json.loads(path.read_text())
            path.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"], "alpha_pattern": {}}))
    return found


@pytest.fixture(scope="session")
def server(tmp_path_factory, tiny_model, adapters) -> TritonServer:
    """The shared server; every adapter is published as version 1."""
    with serving(tmp_path_factory.mktemp("server"), model=str(tiny_model), cache_dir=CACHE, **SETTINGS) as started:
        for name, folder in adapters.items():
            assert publish(folder, name, started.store) == 1
        Http(started).load("adapters")
        yield started
        check_still_runs(started)


@pytest.fixture
def http(server) -> Http:
    return Http(server)


@pytest.fixture
def grpc(server) -> Grpc:
    return Grpc(server)


@pytest.fixture(scope="session")
def operated(tmp_path_factory, tiny_model, adapters) -> TritonServer:
    """A server as an operator may run it: with a key, a request log in a file, and little room everywhere."""
    folder = tmp_path_factory.mktemp("operated")
    little = {"max_slots": 2, "reserved_slots": 0, "max_queue": 2, "lora_slots": 1, "adapter_host_cache_bytes": 20_000, "metrics_adapters": 2}
    own = {"admin_key": ADMIN_KEY, "request_log": str(folder / "requests.jsonl"), "tokens_per_s_per_user": TOKENS_PER_S}
    with serving(folder, model=str(tiny_model), cache_dir=CACHE, **SETTINGS | little | own) as started:
        for name, adapter in adapters.items():
            publish(adapter, name, started.store)
        Http(started, {"admin-key": ADMIN_KEY}).load("adapters")
        yield started
        check_still_runs(started)
