"""A base model that trains in milliseconds: a random Llama of two layers, with a byte-level tokenizer and a chat template."""

import json
import pathlib

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from jaxlora.config import ModelConfig
from jaxlora.weights import tensor_table

SPECIAL = ("<|start|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "eos_token_id": 257, "torch_dtype": "float32",
}  # fmt: skip


def write_model(folder: pathlib.Path, template: str = TEMPLATE) -> pathlib.Path:
    """Writes the model; the same bytes each time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    random = np.random.Generator(np.random.PCG64(0))
    shapes = tensor_table(ModelConfig.from_dict(CONFIG))
    tensors = {
        name: np.ones(shape, np.float32) if "norm" in name else random.normal(0, 0.15, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[1], "chat_template": template}))
    return folder


def write_lines(path: pathlib.Path, records: list) -> pathlib.Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sums(count: int) -> list[dict[str, str]]:
    """A task that a tiny model learns: the next digit."""
    return [{"prompt": f"{at % 10} then ", "completion": f"{(at + 1) % 10}" * (1 + at % 7)} for at in range(count)]


def _tokenizer() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={char: at for at, char in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    return made
