"""A GGUF file written here, with llama.cpp's own row order, comes back as the Hugging Face checkpoint that it was made from."""

import hashlib
import json
import pathlib

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxlora.checkpoint import conversion, safetensors_stream
from jaxlora.errors import SetupError
from jaxlora.text import Tokenizer
from jaxlora.text.pieces import _byte_alphabet

LAYERS, HIDDEN, MLP, HEADS, KV_HEADS = 2, 64, 96, 4, 2
HEAD_DIM = HIDDEN // HEADS
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = [*SPECIAL, *_byte_alphabet(), "Ġt", "he", "Ġthe", "12"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"

DEFAULT_HASHES = {
    "config.json": "31781b18f63a7ee2",
    "generation_config.json": "8025b6679dcf077f",
    "model.safetensors": "a672150fb4f99d7c",
    "tokenizer_config.json": "1e455cc29db79d57",
    "special_tokens_map.json": "5134708447a25ca5",
}


def permute(weights: np.ndarray, n_head: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py, as it stands there for n_head == n_head_kv."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)
    )


def checkpoint() -> dict[str, np.ndarray]:
    """The weights of a tiny Llama by Hugging Face name."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (len(VOCAB), HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (HIDDEN,),
            f"{at}.post_attention_layernorm.weight": (HIDDEN,),
            f"{at}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{at}.mlp.gate_proj.weight": (MLP, HIDDEN),
            f"{at}.mlp.up_proj.weight": (MLP, HIDDEN),
            f"{at}.mlp.down_proj.weight": (HIDDEN, MLP),
        }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: pathlib.Path, weights: dict[str, np.ndarray], architecture: str = "llama", pre: str = "smollm") -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCAB))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCAB)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in VOCAB])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            target = f"blk.{layer}.{GGUF_NAMES[stem]}.weight"
        else:
            target = f"{GGUF_NAMES.get(stem, stem)}.weight"
        if "q_proj" in name or "k_proj" in name:
            weight = permute(weight, HEADS if "q_proj" in name else KV_HEADS)
        if weight.ndim == 1:
            writer.add_tensor(target, weight)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0 if "embed" in name else gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(target, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantised(name: str, weight: np.ndarray) -> np.ndarray:
    if weight.ndim == 1:
        return weight
    kind = gguf.GGMLQuantizationType.Q8_0 if "embed" in name else gguf.GGMLQuantizationType.Q4_1
    return gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)


def convert(tmp_path: pathlib.Path, weights: dict[str, np.ndarray]) -> pathlib.Path:
    write_gguf(tmp_path / "tiny.gguf", weights)
    folder = tmp_path / "out"
    folder.mkdir()
    conversion.convert(tmp_path / "tiny.gguf", folder, progress=lambda line: None)
    return folder


def test_every_weight_comes_back_with_its_name_and_row_order(tmp_path):
    weights = checkpoint()
    converted = safetensors.numpy.load_file(convert(tmp_path, weights) / "model.safetensors")
    assert sorted(converted) == sorted(weights)
    for name, weight in weights.items():
        assert converted[name].dtype == np.float32
        np.testing.assert_array_equal(converted[name], quantised(name, weight), err_msg=name)


def test_an_output_layer_of_its_own_unties_the_model(tmp_path):
    weights = checkpoint()
    weights["lm_head.weight"] = np.random.default_rng(1).standard_normal((len(VOCAB), HIDDEN), np.float32)
    folder = convert(tmp_path, weights)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("num_heads", [1, 3, 9])
def test_undoing_the_permutation_turns_llama_cpps_rotation_into_hugging_faces(num_heads):
    """Rotating neighbours of the stored rows is the same as rotating the halves of ours: no formula of the converter is used."""
    rng, head_dim, position = np.random.default_rng(0), 8, 5
    stored = rng.standard_normal((num_heads * head_dim, 16))
    x = rng.standard_normal(16)
    angle = position * 10000.0 ** (-np.arange(head_dim // 2) / (head_dim // 2))
    rotation = np.exp(1j * angle)

    neighbours = (stored @ x).reshape(num_heads, head_dim // 2, 2)
    theirs = (neighbours[..., 0] + 1j * neighbours[..., 1]) * rotation
    halves = (conversion.undo_permutation(stored, num_heads) @ x).reshape(num_heads, 2, head_dim // 2)
    ours = (halves[:, 0] + 1j * halves[:, 1]) * rotation
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_config_and_tokenizer_come_from_the_metadata(tmp_path):
    folder = convert(tmp_path, checkpoint())
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-05
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (HEADS, KV_HEADS, HEAD_DIM)
    assert config["tie_word_embeddings"] is True
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode(" the 12") == [VOCAB.index(piece) for piece in ("Ġthe", "Ġ", "1", "2")]  # digits are never merged
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "<|im_start|>user\nhi<|im_end|>\n"


def test_what_is_not_a_smollm_file_is_refused_by_name(tmp_path):
    weights = checkpoint()
    for problem, file in {
        "'qwen2'": {"architecture": "qwen2"},
        "'llama-bpe'": {"pre": "llama-bpe"},
        "rope_freqs.weight": {"weights": weights | {"rope_freqs.weight": np.ones(4, np.float32)}},
    }.items():
        write_gguf(tmp_path / "other.gguf", **({"weights": weights} | file))
        with pytest.raises(SetupError, match=problem):
            conversion.convert(tmp_path / "other.gguf", tmp_path, progress=lambda line: None)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_fingerprint_changes_with_the_bytes_and_with_the_version(tmp_path, monkeypatch):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"a")
    first = conversion.fingerprint(file)
    file.write_bytes(b"b")
    second = conversion.fingerprint(file)
    monkeypatch.setattr(conversion, "VERSION", conversion.VERSION + 1)
    assert len({first, second, conversion.fingerprint(file)}) == 3


def test_the_default_models_files_are_those_of_this_version(default_model):
    """When this fails because the converter changed on purpose: raise `conversion.VERSION`, and record the new hashes here."""
    hashes = {}
    for name in DEFAULT_HASHES:
        with (default_model / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    assert (conversion.VERSION, hashes) == (1, DEFAULT_HASHES)


def test_the_stream_writes_what_the_library_reads(tmp_path):
    for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        tensors = {"b": np.arange(6).reshape(2, 3).astype(dtype), "a": np.array(3).astype(dtype), "c": np.zeros((0, 4), dtype)}
        path = tmp_path / "x.safetensors"
        safetensors_stream.write(path, {name: t.shape for name, t in tensors.items()}, tensors.items(), dtype.name)
        with safetensors.safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == set(tensors)
        loaded = safetensors.numpy.load_file(path)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == dtype and loaded[name].shape == tensor.shape
            assert loaded[name].tobytes() == tensor.tobytes()


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", np.zeros(2, np.float32))],
        [("b", np.zeros(2, np.float32)), ("a", np.zeros(2, np.float32))],
        [("a", np.zeros(2, np.float32)), ("b", np.zeros(3, np.float32))],
        [("a", np.zeros(2, np.float32)), ("b", np.zeros(2, np.float64))],
        [("a", np.zeros(2, np.float32)), ("b", np.zeros(2, np.float32)), ("c", np.zeros(2, np.float32))],
    ],
)
def test_the_stream_refuses_tensors_that_were_not_announced(tmp_path, tensors):
    with pytest.raises(ValueError, match="announced"):
        safetensors_stream.write(tmp_path / "x.safetensors", {"a": (2,), "b": (2,)}, tensors)
