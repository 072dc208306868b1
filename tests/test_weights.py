"""Reading checkpoints: whole, sharded, and broken ones, whose every fault is named."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlora import weights
from jaxlora.config import ModelConfig
from jaxlora.errors import SetupError
from tests.parity import checkpoints

WHOLE = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write_checkpoint(tmp_path / "base", "llama")


def load(folder, dtype="float32"):
    return weights.load(folder, ModelConfig.from_folder(folder), dtype)


def rewrite(folder, change):
    tensors = load_file(folder / WHOLE)
    change(tensors)
    save_file(tensors, folder / WHOLE, metadata={"format": "pt"})


def test_every_tensor_lands_where_its_name_says(folder):
    tensors, loaded = load_file(folder / WHOLE), load(folder)
    assert np.array_equal(loaded.embed, tensors["model.embed_tokens.weight"])
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    assert np.array_equal(loaded.layers[1].linears["up_proj"].kernel, up.T)
    assert np.array_equal(loaded.head.kernel, tensors["lm_head.weight"].T)
    assert np.array_equal(loaded.layers[2].post_norm, tensors["model.layers.2.post_attention_layernorm.weight"])


def test_shards_and_one_file_load_the_same(folder, tmp_path):
    tensors = load_file(folder / WHOLE)
    sharded = shutil.copytree(folder, tmp_path / "sharded")
    (sharded / WHOLE).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, sharded / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    one, many = load(folder), load(sharded)
    assert np.array_equal(one.embed, many.embed)
    assert all(np.array_equal(a.linears["q_proj"].kernel, b.linears["q_proj"].kernel) for a, b in zip(one.layers, many.layers))


def test_bfloat16_checkpoints_load_in_both_types(folder):
    rewrite(folder, lambda tensors: tensors.update({name: np.asarray(jnp.asarray(t, jnp.bfloat16)) for name, t in tensors.items()}))
    assert load(folder).embed.dtype == jnp.float32 and load(folder, "bfloat16").embed.dtype == jnp.bfloat16


def test_every_fault_is_named_at_once(folder):
    def spoil(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :5]
        tensors["model.layers.1.input_layernorm.weight"] = np.zeros(64, np.int32)

    rewrite(folder, spoil)
    with pytest.raises(SetupError) as caught:
        load(folder)
    text = str(caught.value)
    assert "lacks 2 tensors" in text and "model.norm.weight" in text and "model.layers.0.mlp.up_proj.weight" in text
    assert "lm_head.weight has shape [256, 5], the config asks for [256, 64]" in text
    assert "model.layers.1.input_layernorm.weight has type I32" in text


def test_a_damaged_or_missing_file_is_said_to_be_so(folder):
    (folder / WHOLE).write_bytes((folder / WHOLE).read_bytes()[:1000])
    with pytest.raises(SetupError, match="can't be read"):
        load(folder)
    (folder / WHOLE).unlink()
    with pytest.raises(SetupError, match="model.safetensors is missing"):
        load(folder)


def test_an_index_cannot_lead_out_of_the_folder(folder):
    (folder / WHOLE).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(SetupError, match="outside the model folder"):
        load(folder)
