"""The benchmark's GGUF files: what llama.cpp reads is what the checkpoint and the adapter say."""

import json
import shutil

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bench import adapters
from bench.gguf_files import NoGguf, write_adapter, write_model
from jaxlora import peft
from jaxlora.checkpoint.conversion import convert
from jaxlora.config import ModelConfig

VOCABULARY = 512
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 5e4, "rms_norm_eps": 1e-5}
HEAD = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory, default_model):
    """A small random checkpoint with the first tokens of the default model's tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    raw = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64, "eos_token_id": 2, "hidden_act": "silu", **SIZES}
    (folder / "config.json").write_text(json.dumps(raw))
    shutil.copy(default_model / "tokenizer_config.json", folder)
    tokenizer = json.loads((default_model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"] = {token: index for token, index in tokenizer["model"]["vocab"].items() if index < VOCABULARY}
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"])
    tokenizer["model"]["merges"] = [merge for merge in merges if "".join(merge) in vocabulary]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    random = np.random.default_rng(0)
    tensors = {
        f"{path}.weight": random.standard_normal((at.out_features, at.in_features), np.float32)
        for path, at in ModelConfig.from_folder(folder).linear_paths().items()
        if path != "lm_head"
    }
    norms = ["model.norm", *(f"model.layers.{layer}.{name}_layernorm" for layer in range(2) for name in ("input", "post_attention"))]
    tensors |= {f"{name}.weight": random.standard_normal(32, np.float32) for name in norms}
    tensors["model.embed_tokens.weight"] = random.standard_normal((VOCABULARY, 32), np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_written_model_converts_back_to_the_same_checkpoint(tmp_path, folder):
    write_model(folder, tmp_path / "it.gguf", ModelConfig.from_folder(folder), "float32")
    (tmp_path / "back").mkdir()
    convert(tmp_path / "it.gguf", tmp_path / "back", lambda line: None)
    expected, found = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    config, back = ModelConfig.from_folder(folder), ModelConfig.from_folder(tmp_path / "back")
    assert (back.rope, back.rms_norm_eps, back.tied, back.max_positions) == (config.rope, pytest.approx(1e-5), True, 64)


def test_bfloat16_is_for_matrices_only(tmp_path, folder):
    write_model(folder, tmp_path / "it.gguf", ModelConfig.from_folder(folder), "bfloat16")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "it.gguf").tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"BF16"}


def test_int8_is_for_rows_of_whole_blocks(tmp_path, folder):
    write_model(folder, tmp_path / "it.gguf", ModelConfig.from_folder(folder), "int8")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "it.gguf").tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "ffn_down" in name} == {"BF16"}, "rows of 48 values, and a block has 32"
    assert {kind for name, kind in kinds.items() if "norm" not in name and "ffn_down" not in name} == {"Q8_0"}
    expected = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    found = gguf.quants.dequantize(tensors["blk.0.ffn_up.weight"].data, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 250)


def test_an_adapters_change_is_the_same_after_writing(tmp_path, folder):
    config = ModelConfig.from_folder(folder)
    adapter = adapters.random_adapter(config, 4, seed=0)
    peft.write(tmp_path, adapter)
    write_adapter(tmp_path, tmp_path / "it.gguf", config, "float32")
    reader = gguf.GGUFReader(tmp_path / "it.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == 8
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 2 * len(adapter.modules)
    for module, kind in (("model.layers.1.mlp.down_proj", "blk.1.ffn_down"), ("model.layers.0.self_attn.q_proj", "blk.0.attn_q")):
        change = tensors[f"{kind}.weight.lora_b"] @ tensors[f"{kind}.weight.lora_a"]
        expected = adapter.modules[module].b @ adapter.modules[module].a
        if kind.endswith("attn_q"):  # neighbours of a head lie half a head apart in the checkpoint
            expected = expected.reshape(-1, 2, HEAD // 2, 32).transpose(0, 2, 1, 3).reshape(change.shape)
        np.testing.assert_allclose(change, expected, rtol=1e-5, atol=1e-7)


def test_other_models_are_refused_and_leave_no_file(tmp_path, folder):
    raw = json.loads((folder / "config.json").read_text()) | {"attention_bias": True}
    with pytest.raises(NoGguf, match="plain Llama"):
        write_model(folder, tmp_path / "it.gguf", ModelConfig.from_dict(raw), "float32")
    assert not list(tmp_path.iterdir())
