"""The shape of a model as Transformers' config files of several versions spell it, and what is refused."""

import json

import pytest

from jaxlora.config import ModelConfig, Rope
from jaxlora.errors import SetupError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def read(**changes):
    return ModelConfig.from_dict({**LLAMA, **changes})


def test_what_is_left_out_has_the_defaults_of_transformers():
    config = read()
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps, config.rope) == (4, 16, 1e-6, Rope(10000.0))
    assert (config.tied, config.qkv_bias, config.windows, config.max_positions) == (False, False, (0, 0, 0), 2048)


@pytest.mark.parametrize(
    ("spelling", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, Rope(5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, Rope(1e4, "linear", 2.0, original_max_position=2048)),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 4096}},
            Rope(5e5, "llama3", 32.0, 1.0, 4.0, 4096),
        ),
    ],
)
def test_rope_is_read_in_old_and_new_spelling(spelling, rope):
    assert read(**spelling).rope == rope


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"architectures": ["MistralForCausalLM"]}, (4096,) * 3),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (0,) * 3),
        ({"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "sliding_window": 7}, (0,) * 3),
        (
            {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2},
            (0, 0, 7),
        ),
    ],
)
def test_sliding_windows_are_those_of_the_architecture(changes, windows):
    assert read(**{"num_key_value_heads": 4, **changes}).windows == windows


def test_biases_and_norms_are_those_of_the_architecture():
    qwen2 = read(architectures=["Qwen2ForCausalLM"], num_key_value_heads=2)
    qwen3 = read(architectures=["Qwen3ForCausalLM"], num_key_value_heads=2)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    llama = read(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias) == (True, True, True)


def test_every_linear_layer_has_its_path():
    paths = read(num_key_value_heads=2).linear_paths()
    assert len(paths) == 3 * 7 + 1
    assert (paths["model.layers.2.self_attn.k_proj"].in_features, paths["model.layers.2.self_attn.k_proj"].out_features) == (64, 32)
    assert (paths["lm_head"].layer, paths["lm_head"].out_features) == (None, 100)


def test_stop_tokens_come_from_the_generation_config_where_there_is_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (3, 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are: LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": None, "model_type": "bert"}, "bert is not supported"),
        ({"hidden_size": None, "rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not supported"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantized checkpoints are not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"eos_token_id": 100}, r"eos_token_id \[100\] is not between 0 and 99"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(changes, words):
    with pytest.raises(SetupError, match=words):
        read(**{"head_dim": 16, **changes})


def test_missing_keys_are_all_named():
    with pytest.raises(SetupError, match="lacks vocab_size, num_hidden_layers"):
        ModelConfig.from_dict({key: value for key, value in LLAMA.items() if key not in ("vocab_size", "num_hidden_layers")})


def test_a_folder_without_a_config_is_said_to_be_none(tmp_path):
    with pytest.raises(SetupError, match="not a Hugging Face model folder"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SetupError, match="can't be read"):
        ModelConfig.from_folder(tmp_path)
