"""From a JSONL file to a version that a running server answers with, through the script and a real Triton."""

import json
import pathlib

import pytest

from jaxlora.files import replace
from server.launch import TritonServer
from tests.training import tiny
from training import sft

from .harness import CACHE, Http, Refused, serving

# Adapters in 8 bits, as other servers of these tests have them in the type of the weights.
SETTINGS = {"max_slots": 2, "max_seq_len": 128, "prefill_chunk": 16, "lora_slots": 2, "max_lora_rank": 8, "lora_quantization": "int8"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> TritonServer:
    model = tiny.write_model(tmp_path_factory.mktemp("model") / "tiny")
    with serving(tmp_path_factory.mktemp("server"), model=str(model), cache_dir=CACHE, **SETTINGS) as started:
        yield started


def train(server: TritonServer, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, *more: object) -> int:
    for name, value in server.settings.environment().items():
        monkeypatch.setenv(name, value)
    data = folder / "data.jsonl"
    if not data.exists():
        replace(data, b"".join(json.dumps({"text": "abcabcabcabcabc"}).encode() + b"\n" for _ in range(8)))
    options = ["--data", data, "--name", "alice/abc", "--store", server.store, "--url", server.grpc_url, "--run", folder / "run"]
    options += ["--max-steps", 30, "--batch-size", 8, "--rank", 4, "--lr", 3e-2]
    return sft.main([str(word) for word in [*options, *more]])


def test_a_trained_adapter_is_what_the_server_answers_with(
    server: TritonServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    http = Http(server)
    before = http.generate(text_input="abcab", max_tokens=6)
    assert train(server, tmp_path, monkeypatch) == 0
    assert f"alice/abc@1 is live: {server.grpc_url} answers with it" in capsys.readouterr().err
    answer = http.generate(text_input="abcab", lora_name="alice/abc", max_tokens=6)
    assert answer["text_output"].removeprefix("abcab").startswith("cabcab") and answer["adapter_version"] == 1
    assert before["text_output"] != answer["text_output"]
    # Again: the run finds its version, and the next run makes the next one.
    assert train(server, tmp_path, monkeypatch) == 0
    assert "alice/abc@1 is live" in capsys.readouterr().err
    assert train(server, tmp_path, monkeypatch, "--init", "alice/abc@1", "--run", tmp_path / "more") == 0
    assert "alice/abc@2 is live" in capsys.readouterr().err
    assert http.generate(text_input="a", lora_name="alice/abc", max_tokens=1)["adapter_version"] == 2


def test_what_the_server_refuses_is_told_and_changes_nothing(
    server: TritonServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The server's limit is 8; this process is told of a larger one.
    monkeypatch.setattr(type(server.settings), "environment", lambda settings: {"MODEL": settings.model, "CACHE_DIR": str(CACHE)})
    assert train(server, tmp_path, monkeypatch, "--name", "alice/big", "--rank", 16, "--max-steps", 1) == 1
    said = capsys.readouterr().err
    assert "alice/big@1 was refused" in said and "ranks over the limit 8" in said and "Traceback" not in said
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    with pytest.raises(Refused, match="alice/big"):
        Http(server).generate(text_input="a", lora_name="alice/big", max_tokens=1)
