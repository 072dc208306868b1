"""Tiny adapters for tests: a base model of three small layers, and folders that fit it or have one fault."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from jaxlora import peft
from jaxlora.config import ModelConfig
from jaxlora.peft.check import tensor_key

TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
BASE = ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"], **TINY})
LIMITS = peft.Limits(max_rank=8, max_file_bytes=1 << 20)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def adapter(seed: int = 0, dtype: Any = np.float32, base: ModelConfig = BASE, **options: Any) -> peft.LoraAdapter:
    """An adapter with random weights; `options` are those of `peft.new_config`."""
    config = peft.new_config(**({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | options))
    parsed = peft.AdapterConfig.from_dict(config)
    random = np.random.default_rng(seed)
    modules = {
        module: peft.LoraPair(
            random.standard_normal((parsed.rank(module), at.in_features)).astype(dtype),
            random.standard_normal((at.out_features, parsed.rank(module))).astype(dtype),
            parsed.scale(module),
        )
        for module, at in base.linear_paths().items()
        if parsed.selects(module)
    }
    return peft.LoraAdapter(modules, config)


def folder(path: pathlib.Path, **options: Any) -> pathlib.Path:
    """A valid folder, written by this project."""
    path.mkdir(parents=True)
    peft.write(path, adapter(**options))
    return path


def tensors_of(modules: peft.LoraAdapter) -> dict[str, np.ndarray]:
    """The tensors of an adapter by their name in the file."""
    return {
        tensor_key(module, side): array
        for module, pair in modules.modules.items()
        for side, array in (("A", pair.a), ("B", pair.b))
    }


def write_raw(path: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> pathlib.Path:
    """A folder with whatever is asked for, right or wrong."""
    path.mkdir(parents=True, exist_ok=True)
    (path / peft.CONFIG_FILE).write_text(json.dumps(config))
    (path / peft.WEIGHTS_FILE).write_bytes(safetensors.numpy.save(dict(tensors), metadata={"format": "pt"}))
    return path
