"""Turns a Llama GGUF file into an ordinary Hugging Face folder, in float32.

Knows GGUF's names of tensors and metadata (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and what llama.cpp
changes when it writes such a file. Reads one architecture and one tokenizer, those of SmolLM2, and refuses others by name.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlora.checkpoint import gguf_tokenizer, safetensors_stream
from jaxlora.checkpoint.folder import WEIGHTS
from jaxlora.errors import SetupError

if TYPE_CHECKING:
    from jaxlora.checkpoint.gguf_reader import Reader

# Goes up whenever the folder that `convert` writes changes, so that an older one in a cache is not taken for it.
VERSION = 1

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def fingerprint(source: pathlib.Path) -> str:
    """Twelve hex digits that name what `convert` makes of `source`: they change with the file's bytes and with `VERSION`."""
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(f"converter {VERSION}".encode())
    return digest.hexdigest()[:12]


def convert(source: pathlib.Path, folder: pathlib.Path, progress: Callable[[str], None] = print) -> None:
    """Writes config, generation config, weights and tokenizer of the GGUF file `source` into the empty `folder`.

    Holds one dequantised tensor in memory at a time.

    Raises:
        SetupError: the file's architecture or tokenizer is another one, or a tensor is unknown.
    """
    # Here, because only the first start on a machine needs it.
    from jaxlora.checkpoint.gguf_reader import Reader

    progress(f"reading {source.name}")
    reader = Reader(source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise SetupError(f"{source.name} holds a model of architecture {architecture!r}; only 'llama' can be converted")
    names = {tensor.name: hugging_face_name(tensor.name) for tensor in reader.tensors}
    unknown = [name for name, new in names.items() if new is None]
    if unknown:
        raise SetupError(f"{source.name} holds tensors that a Llama model does not have: {', '.join(sorted(unknown))}")

    config = model_config(metadata, tied="output.weight" not in names)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
    tokenizer, tokenizer_config, special_tokens = gguf_tokenizer.build(metadata)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "special_tokens_map.json", special_tokens)
    safetensors_stream.write(
        folder / WEIGHTS,
        # GGUF lists the fastest dimension first.
        {names[tensor.name]: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors},
        _tensors(reader, names, config, progress),
    )


def hugging_face_name(name: str) -> str | None:
    """The Hugging Face name of a Llama tensor's GGUF name; None for an unknown one."""
    if block := _BLOCK.fullmatch(name):
        inner = _INNER.get(block[2])
        return inner and f"model.layers.{block[1]}.{inner}"
    return _OUTER.get(name)


def undo_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection in Hugging Face's order.

    Within each head, llama.cpp rotates neighbouring rows (2i, 2i+1) where Hugging Face rotates row i with row i + head_dim/2. Its
    converter therefore interleaves the two halves of each head (`LlamaModel.permute` in convert_hf_to_gguf.py); this is the
    inverse.

    Arguments:
        weight: [num_heads * head_dim, hidden_size] as llama.cpp stores it.
        num_heads: query heads, or key/value heads for a key projection.
    """
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def model_config(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    """`config.json` of a Llama model from its GGUF metadata."""
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "head_dim": metadata.get("llama.attention.key_length", metadata["llama.embedding_length"] // heads),
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": _as_written(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_scaling": None,
        "rope_theta": _as_written(metadata.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": metadata["llama.vocab_size"],
    }


def _as_written(value: float) -> float:
    """The shortest decimal number that gives the same float32: GGUF stores 1e-05 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _tensors(
    reader: "Reader", names: dict[str, str], config: dict[str, Any], progress: Callable[[str], None]
) -> Iterator[tuple[str, np.ndarray]]:
    from gguf.quants import dequantize

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    total, done, shown = sum(int(tensor.n_elements) for tensor in reader.tensors), 0, 0
    for tensor in reader.tensors:
        name = names[tensor.name]
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        projection = name.split(".")[-2]
        yield name, undo_permutation(weight, heads[projection]) if projection in heads else weight
        done += int(tensor.n_elements)
        if (quarter := 4 * done // total) > shown:
            shown = quarter
            progress(f"weights {25 * quarter} % converted")


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
