"""A merged checkpoint is the base model with the adapter, and an ordinary checkpoint."""

import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from client import adapters as command
from client.merging import EMBEDDING, merge
from jaxlora import lora, model, peft, weights
from jaxlora.adapters import publish
from jaxlora.checkpoint import resolve
from jaxlora.config import ModelConfig
from jaxlora.errors import SetupError

from .parity import checkpoints
from .triton.harness import write_byte_tokenizer

LIMITS = peft.Limits(max_rank=64, max_file_bytes=1 << 24, output_layer=True)
_logits = jax.jit(model.logits, static_argnames="config")


def logits(folder: pathlib.Path, adapter: peft.LoraAdapter | None = None) -> np.ndarray:
    config = ModelConfig.from_folder(folder)
    applied = lora.Adapter.from_pairs(adapter.modules) if adapter else None
    return np.asarray(_logits(config, weights.load(folder, config, "float32"), checkpoints.batch()[:2], applied))


def parts(folder: pathlib.Path, architecture: str, variant: str) -> tuple[pathlib.Path, peft.LoraAdapter]:
    base = write_byte_tokenizer(checkpoints.write_checkpoint(folder / "base", architecture))
    written = checkpoints.write_adapter(folder / "adapter", architecture, variant)
    return base, peft.read(written, ModelConfig.from_folder(base), LIMITS)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Within a share of the largest logit: these random models have logits of 30, where float32 alone gives differences of
    1e-4."""
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


# Tied and untied output layers, with and without an adapter on it; several files; biases.
@pytest.mark.parametrize(
    ("architecture", "variant"),
    [("llama", "rslora-patterns"), ("llama-llama3", "patterns"), ("llama-llama3", "rslora-patterns"), ("qwen2", "every-linear")],
)
def test_merged_logits_are_those_of_base_and_adapter(tmp_path, architecture, variant):
    base, adapter = parts(tmp_path, architecture, variant)
    merge(base, adapter, tmp_path / "merged", dtype="float32")
    expected = logits(base, adapter)
    assert np.abs(expected - logits(base)).max() > 0.01
    assert_close(logits(tmp_path / "merged"), expected)


@pytest.mark.parametrize("architecture", list(checkpoints.ARCHITECTURES))
def test_a_merged_folder_is_a_whole_checkpoint(tmp_path, architecture):
    base, adapter = parts(tmp_path, architecture, "attention")
    (base / "LICENSE").write_text("free")
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    merge(base, adapter, tmp_path / "merged")
    assert resolve(str(tmp_path / "merged"), tmp_path / "cache") == tmp_path / "merged"
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {file.name for file in base.iterdir()} - {
        "pytorch_model.bin"
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "merged"))
    assert after == before
    assert list(tmp_path.glob(".*")) == []


def test_what_the_adapter_does_not_touch_stays_bit_for_bit(tmp_path):
    base, adapter = parts(tmp_path, "llama-llama3", "attention")
    merge(base, adapter, tmp_path / "merged")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert set(before) == set(after)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"{module}.weight" for module in adapter.modules}


def test_a_tied_output_layer_with_an_adapter_becomes_its_own_and_the_embedding_stays(tmp_path):
    base, adapter = parts(tmp_path, "llama-llama3", "rslora-patterns")
    merge(base, adapter, tmp_path / "merged")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_array_equal(after[EMBEDDING], before[EMBEDDING])
    assert set(after) - set(before) == {"lm_head.weight"}
    assert not ModelConfig.from_folder(tmp_path / "merged").tied


def test_the_type_is_that_of_the_base_unless_another_is_asked_for(tmp_path):
    base, adapter = parts(tmp_path, checkpoints.STORED_AS_BFLOAT16, "attention")
    merge(base, adapter, tmp_path / "same")
    merge(base, adapter, tmp_path / "wide", dtype="float32")
    assert json.loads((tmp_path / "same" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("same", "wide")]
    assert sizes[1] > 1.9 * sizes[0]
    expected = logits(base, adapter)
    assert_close(logits(tmp_path / "wide"), expected)
    # Weights that are rounded to 8 bits of mantissa.
    assert_close(logits(tmp_path / "same"), expected, tolerance=0.05)


def test_a_base_of_links_as_in_the_hubs_cache_is_merged(tmp_path):
    base, adapter = parts(tmp_path, "llama", "attention")
    merge(base, adapter, tmp_path / "merged")
    (tmp_path / "snapshot").mkdir()
    for file in base.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    merge(tmp_path / "snapshot", adapter, tmp_path / "other")
    for file in (tmp_path / "merged").iterdir():
        other = tmp_path / "other" / file.name
        assert not other.is_symlink() and other.read_bytes() == file.read_bytes()


def test_nothing_is_left_where_it_fails(tmp_path):
    base, adapter = parts(tmp_path, "llama", "attention")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SetupError, match="model.layers.1.self_attn.q_proj.weight"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and list(tmp_path.glob(".*")) == []


def test_an_existing_folder_is_not_touched(tmp_path):
    base, adapter = parts(tmp_path, "llama", "attention")
    (tmp_path / "merged").mkdir()
    with pytest.raises(SetupError, match="exists already"):
        merge(base, adapter, tmp_path / "merged")
    assert list((tmp_path / "merged").iterdir()) == []


def test_the_command_merges_the_version_that_the_policy_serves(tmp_path, monkeypatch, capsys):
    base = write_byte_tokenizer(checkpoints.write_checkpoint(tmp_path / "base", "llama"))
    store = tmp_path / "store"
    store.mkdir()
    for variant in ("attention", "rslora"):
        publish(checkpoints.write_adapter(tmp_path / variant, "llama", variant), "alice/sql", store)
    monkeypatch.setenv("MODEL", str(base))
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))

    def run(name: str, output: str) -> int:
        return command.main(["merge", name, "--store", str(store), "--output", str(tmp_path / output)])

    assert run("alice/sql", "newest") == run("alice/sql@1", "first") == 0
    (store / "users/alice/adapters/sql/policy.json").write_text('{"serve": 1}')
    assert run("alice/sql", "served") == 0
    assert "MODEL=" in capsys.readouterr().out
    assert [
        json.loads((tmp_path / name / "provenance.json").read_text())["adapter"] for name in ("newest", "first", "served")
    ] == [
        "alice/sql@2",
        "alice/sql@1",
        "alice/sql@1",
    ]
    first = peft.read(tmp_path / "attention", ModelConfig.from_folder(base), LIMITS)
    assert_close(logits(tmp_path / "served"), logits(base, first))
    assert run("alice/sql@7", "nothing") == 1
    assert "versions of alice/sql there: 1, 2" in capsys.readouterr().err
    assert run("alice/sql", "first") == 1
    assert "exists already" in capsys.readouterr().err
