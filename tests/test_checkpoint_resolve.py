"""Each way to name a base model, and what is said when it can't be used."""

import importlib.util
import json
import pathlib

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy

from jaxlora.checkpoint import resolve
from jaxlora.errors import SetupError


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    safetensors.numpy.save_file({"x": np.ones(3, np.float32)}, folder / "model.safetensors")
    return folder


def refusal(model, tmp_path) -> str:
    with pytest.raises(SetupError) as error:
        resolve(str(model), tmp_path / "cache", progress=lambda line: None)
    return str(error.value)


def test_a_local_folder_is_used_as_it_is(folder, tmp_path):
    assert resolve(str(folder), tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


def test_everything_missing_is_named_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    said = refusal(tmp_path / "empty", tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert f"{name} is missing" in said
    assert len(said.splitlines()) == 3


def test_pickles_and_a_lone_sentencepiece_model_are_explained(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"")
    said = refusal(folder, tmp_path)
    assert "pytorch_model.bin is there, but only safetensors are read" in said
    assert "save_pretrained" in said


def test_truncated_weights_are_found_before_loading(folder, tmp_path):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-4])
    assert "model.safetensors is damaged" in refusal(folder, tmp_path)


def test_broken_json_is_named(folder, tmp_path):
    (folder / "config.json").write_text("{")
    (folder / "tokenizer.json").write_text("[]")
    said = refusal(folder, tmp_path)
    assert "config.json can't be read" in said
    assert "tokenizer.json is not a JSON object" in said


def test_shards_are_checked_one_by_one(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(folder, tmp_path).splitlines() == [f"MODEL: {folder}: model-00002-of-00002.safetensors is missing"]
    safetensors.numpy.save_file({"y": np.ones(3, np.float32)}, folder / "model-00002-of-00002.safetensors")
    assert resolve(str(folder), tmp_path / "cache") == folder


@pytest.mark.parametrize("shard", ["../model/model.safetensors", "/etc/passwd"])
def test_a_shard_outside_the_folder_is_refused(folder, tmp_path, shard):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    assert "outside the folder" in refusal(folder, tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"x": 3}}'])
def test_a_broken_index_is_refused(folder, tmp_path, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json can't be read" in refusal(folder, tmp_path)


@pytest.mark.parametrize("model", ["smollm", "/no/such/folder", "./models/x", "a/b/c", "x y/z", "owner/..", "gpt2"])
def test_an_unknown_name_says_what_is_possible(tmp_path, model):
    said = refusal(model, tmp_path)
    assert "smollm2-135m-instruct" in said and "owner/name" in said and repr(model) in said


def test_a_file_is_not_a_model(folder, tmp_path):
    assert "is a file, not a folder" in refusal(folder / "config.json", tmp_path)


def test_a_hub_id_is_downloaded_and_checked(folder, tmp_path, monkeypatch):
    asked = []

    def download(repo_id, **options):
        asked.append(repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name-1.5B", tmp_path / "cache", progress=lambda line: None) == folder
    assert asked == ["owner/name-1.5B"]
    (folder / "tokenizer.json").unlink()
    assert "owner/name-1.5B: tokenizer.json is missing" in refusal("owner/name-1.5B", tmp_path)


def test_a_hub_that_can_not_be_reached_is_one_clear_line(tmp_path, monkeypatch):
    def download(repo_id, **options):
        raise ConnectionError("no route to host\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said = refusal("owner/name", tmp_path)
    assert "no route to host" in said and "\n" not in said


def test_the_default_model_without_its_wheel_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in refusal("smollm2-135m-instruct", tmp_path)


def test_the_default_model_resolves_to_the_same_folder_again(default_model):
    lines: list[str] = []
    assert resolve("smollm2-135m-instruct", default_model.parent.parent, lines.append) == default_model
    assert lines == []
