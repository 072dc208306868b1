"""The same base model and adapters as GGUF files, for llama.cpp: `write_model`, `write_adapter`.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's convert_hf_to_gguf.py and convert_lora_to_gguf.py.
Llama only. The tokenizer's vocabulary is in it because llama.cpp reads no file without one; prompts are sent as token ids.
"""

import json
import pathlib

import gguf
import numpy as np
from safetensors.numpy import load_file

from jaxlora import peft
from jaxlora.config import ModelConfig

TYPES = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16, "int8": gguf.GGMLQuantizationType.Q8_0}
_ARCHITECTURE = "llama"
_CONTROL = int(gguf.TokenType.CONTROL)


class NoGguf(Exception):
    """This model can't be written as GGUF here."""


def write_model(folder: pathlib.Path, path: pathlib.Path, config: ModelConfig, dtype: str) -> None:
    """Writes the base model of a Hugging Face folder; its norms stay in float32, as llama.cpp wants them.

    Raises:
        NoGguf: the model is no plain Llama.
    """
    if config.architecture != _ARCHITECTURE or config.rope.kind != "default" or config.qkv_bias or config.mlp_bias or config.output_bias:
        raise NoGguf(f"GGUF files are written of plain Llama models only")
    with _Writer(path) as writer:
        writer.add_context_length(config.max_positions)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_heads)
        writer.add_head_count_kv(config.num_kv_heads)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope.theta)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        _add_tokenizer(writer, folder, config)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
        for file in sorted(folder.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                if name == "lm_head.weight" and config.tied:
                    continue
                _add(writer, names.get_name(name, (".weight",)), _permuted(name, tensor, config), dtype if tensor.ndim > 1 else "float32")


def write_adapter(folder: pathlib.Path, path: pathlib.Path, config: ModelConfig, dtype: str) -> None:
    """Writes the adapter of a PEFT folder."""
    adapter = peft.read(folder, config, peft.Limits(max_rank=1 << 16, max_file_bytes=1 << 40))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    with _Writer(path) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        # llama.cpp divides this by the rank.
        writer.add_float32("adapter.lora.alpha", float(adapter.config["lora_alpha"]))
        for module, pair in adapter.modules.items():
            name = names.get_name(module) + ".weight"
            _add(writer, f"{name}.lora_a", pair.a, dtype)
            _add(writer, f"{name}.lora_b", _permuted(module, pair.b, config), dtype)


class _Writer(gguf.GGUFWriter):
    """Writes to a name of its own, which only a complete file loses."""

    def __init__(self, path: pathlib.Path):
        self._final, self._partial = path, path.with_suffix(".partial")
        super().__init__(self._partial, _ARCHITECTURE)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.write_header_to_file()
            self.write_kv_data_to_file()
            self.write_tensors_to_file()
        self.close()
        if kind is None:
            self._partial.rename(self._final)


def _add(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, dtype: str) -> None:
    tensor = np.ascontiguousarray(tensor, np.float32)
    block, _ = gguf.GGML_QUANT_SIZES[TYPES[dtype]]
    kind = TYPES["bfloat16" if tensor.shape[-1] % block else dtype]
    writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)


def _permuted(name: str, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The rows of query and key projections in the order of llama.cpp's RoPE, which turns neighbours and not halves."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(kind)
    if heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: pathlib.Path, config: ModelConfig) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    if tokenizer["model"]["type"] != "BPE":
        raise NoGguf(f"GGUF files are written with a BPE tokenizer only, not with {tokenizer['model']['type']}")
    tokens, kinds = [f"[PAD{index}]" for index in range(config.vocab_size)], [int(gguf.TokenType.UNUSED)] * config.vocab_size
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], kinds[index] = token, int(gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], _CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    special = json.loads((folder / "tokenizer_config.json").read_text())
    if isinstance(special.get("chat_template"), str):
        writer.add_chat_template(special["chat_template"])
    for kind, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id)):
        token = special.get(f"{kind}_token")
        if token is not None:
            add(tokens.index(token["content"] if isinstance(token, dict) else token))
