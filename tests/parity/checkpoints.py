"""Small random checkpoints and adapters, the same to the bit on every machine: what parity is measured on.

Writes ordinary Hugging Face and PEFT folders from the tables below, with NumPy alone. Knows no torch, and takes nothing from `jaxlora`:
what it says about module paths and shapes is an account of the two formats of its own.

Every number comes from the raw output of PCG64, which NumPy promises never to change, by exact float64 arithmetic. Each tensor has a
stream of its own, seeded by its name.
"""

import hashlib
import json
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

VOCABULARY = 256
LAYERS = 3
LENGTH = 40  # tokens of each row whose logits are compared
PROMPT_LENGTHS = (40, 7, 150, 1, 33, 70)  # of the prompts that are continued; one goes past a block of cached attention
PROMPTS = 3  # of them for each variant
NEW_TOKENS = 32

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,  # nothing ends a continuation early
    "pad_token_id": 0,
    "torch_dtype": "float32",
}

# `config.json` of each architecture. Old and new spellings both occur, as they do in checkpoints; the norm's epsilon and the rotary
# base are far from their defaults somewhere, so that ignoring one shows.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 10000.0},
    # The layers of SmolLM2-135M, the default model: sizes that no tile of a kernel divides evenly, three query heads to a key.
    "llama-smollm2": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    },
    "llama-llama3": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": 8,
        "rms_norm_eps": 0.02,
        "tie_word_embeddings": True,
        "rope_theta": 5000.0,
        # An original length of 64 puts frequencies of this small head into all three bands: kept, blended and divided.
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-linear": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "mistral": {
        **_COMMON,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_key_value_heads": 1,
        "sliding_window": 12,
        "rope_theta": 1000000.0,
    },
    "qwen2": {
        **_COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 2,
        "rope_theta": 1000000.0,
    },
    "qwen3": {
        **_COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}
# Which draw of random prompts an architecture continues: the first in which no greedy token is nearly a tie.
_PROMPT_DRAW = {"llama-linear": 3, "qwen2": 1}
SHARDED = "qwen3"
STORED_AS_BFLOAT16 = "qwen2"

_LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "parity",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "lora_dropout": 0.1,
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}

# `adapter_config.json` of each adapter. In the patterns some modules match several keys: the first one counts.
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {**_LORA, "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "every-linear": {**_LORA, "r": 16, "lora_alpha": 24, "target_modules": "all-linear"},
    "rslora": {**_LORA, "r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"]},
    "patterns": {
        **_LORA,
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.down_proj": 12, r"layers\.[12]\.mlp\..*": 5},
        "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.o_proj": 20, "down_proj": 6, r"mlp\.\w+_proj": 11},
    },
    "rslora-patterns": {
        **_LORA,
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": r".*\.(o_proj|down_proj)|lm_head",
        "rank_pattern": {"lm_head": 6, r"2\.mlp\.down_proj": 1},
        "alpha_pattern": {"lm_head": 4},
    },
}
BASE = "base"
VARIANTS = (BASE, *ADAPTERS)  # variant k is the one that row k of a mixed batch has


def write_checkpoint(folder: pathlib.Path, architecture: str) -> pathlib.Path:
    """Writes `config.json` and the weights of a checkpoint; one architecture is sharded, one is stored in bfloat16."""
    folder.mkdir(parents=True)
    config = ARCHITECTURES[architecture]
    tensors = _base_tensors(architecture, config)
    if architecture == STORED_AS_BFLOAT16:
        tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
        config = {**config, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if architecture == SHARDED:
        _save_sharded(folder, tensors, shards=3)
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_adapter(folder: pathlib.Path, architecture: str, adapter: str) -> pathlib.Path:
    """Writes `adapter_config.json` and `adapter_model.safetensors` as PEFT does, with A and B both far from zero."""
    folder.mkdir(parents=True)
    config = ADAPTERS[adapter]
    tensors = {}
    for path, rank in _RANKS[adapter].items():
        size_out, size_in = _linear_shapes(ARCHITECTURES[architecture])[path]
        stream = f"{architecture}/{adapter}/{path}"
        name = f"base_model.model.{path}"
        tensors[f"{name}.lora_A.weight"] = _random(f"{stream}.A", (rank, size_in), deviation=size_in**-0.5)
        tensors[f"{name}.lora_B.weight"] = _random(f"{stream}.B", (size_out, rank), deviation=0.4 * rank**-0.5)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def batch() -> np.ndarray:
    """int32 `[len(VARIANTS), LENGTH]`: the rows whose logits are compared."""
    return _tokens("batch", len(VARIANTS) * LENGTH).reshape(len(VARIANTS), LENGTH)


def prompts(architecture: str, variant: str) -> list[list[int]]:
    """The prompts that a variant continues greedily: three of `PROMPT_LENGTHS`, so that every prompt has three variants."""
    stream = f"prompt/{_PROMPT_DRAW.get(architecture, 0)}"
    first = VARIANTS.index(variant)
    rows = [(first + step) % len(PROMPT_LENGTHS) for step in range(PROMPTS)]
    return [_tokens(f"{stream}/{row}", PROMPT_LENGTHS[row]).tolist() for row in rows]


def fingerprint(folder: pathlib.Path) -> str:
    """One hash over every tensor and the config of a folder: tells other weights from other outputs."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*config.json")):
        digest.update(file.read_bytes())
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()


def _linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    hidden, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = config.get("head_dim", hidden // heads)
    q, kv = heads * size, config["num_key_value_heads"] * size
    layer = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    shapes = {f"model.layers.{number}.{path}": shape for number in range(LAYERS) for path, shape in layer.items()}
    return {**shapes, "lm_head": (config["vocab_size"], hidden)}


def _base_tensors(architecture: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    hidden = config["hidden_size"]
    tensors = {}

    def add(name: str, shape: tuple[int, ...], deviation: float, mean: float = 0.0) -> None:
        tensors[name] = _random(f"{architecture}/{name}", shape, deviation, mean)

    # Logits with a deviation of 6: far enough apart for greedy tokens to be sure, large enough to make 1e-3 a sharp bound.
    output = 6.0 * hidden**-0.5
    add("model.embed_tokens.weight", (VOCABULARY, hidden), output if config["tie_word_embeddings"] else 1.0)
    for path, shape in _linear_shapes(config).items():
        if path == "lm_head":
            if not config["tie_word_embeddings"]:
                add("lm_head.weight", shape, output)
            continue
        # Queries and keys are larger, so that attention picks tokens and positions matter; what a layer adds is larger, so that a
        # continuation is more than the last token over and over.
        gain = 2.0 if path.endswith(("q_proj", "k_proj")) else 3.0 if path.endswith(("o_proj", "down_proj")) else 1.0
        add(f"{path}.weight", shape, gain * shape[1] ** -0.5)
        if _has_bias(config, path):
            add(f"{path}.bias", shape[:1], 0.3)
    for number in range(LAYERS):
        prefix = f"model.layers.{number}"
        add(f"{prefix}.input_layernorm.weight", (hidden,), 0.2, mean=1.0)
        add(f"{prefix}.post_attention_layernorm.weight", (hidden,), 0.2, mean=1.0)
        if config["model_type"] == "qwen3":
            add(f"{prefix}.self_attn.q_norm.weight", (config["head_dim"],), 0.3, mean=1.3)
            add(f"{prefix}.self_attn.k_norm.weight", (config["head_dim"],), 0.3, mean=1.3)
    add("model.norm.weight", (hidden,), 0.2, mean=1.0)
    return tensors


def _has_bias(config: dict[str, Any], path: str) -> bool:
    if config["model_type"] == "qwen2":
        return path.endswith(("q_proj", "k_proj", "v_proj"))
    return bool(config.get("attention_bias" if ".self_attn." in path else "mlp_bias"))


def _layers(*paths: str, rank: int) -> dict[str, int]:
    return {f"model.layers.{number}.{path}": rank for number in range(LAYERS) for path in paths}


# The modules of each adapter with their ranks, written out by hand. The recording checks that PEFT makes exactly these of the configs.
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_RANKS: dict[str, dict[str, int]] = {
    "attention": _layers("self_attn.q_proj", "self_attn.v_proj", rank=4),
    "every-linear": _layers(*_ATTENTION, *_MLP, rank=16),
    "rslora": _layers(*_ATTENTION, rank=8),
    "patterns": {
        **_layers(*_ATTENTION, rank=8),
        **_layers("self_attn.q_proj", rank=2),
        **_layers(*_MLP, rank=5),
        **{f"model.layers.0.{path}": 8 for path in _MLP},
        "model.layers.1.mlp.down_proj": 12,
    },
    "rslora-patterns": {
        **_layers("self_attn.o_proj", "mlp.down_proj", rank=4),
        "model.layers.2.mlp.down_proj": 1,
        "lm_head": 6,
    },
}


def _save_sharded(folder: pathlib.Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    names, weight_map = list(tensors), {}
    share = math.ceil(len(names) / shards)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard * share : (shard + 1) * share]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _raw(stream: str, count: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:16], "little")
    return np.random.PCG64(seed).random_raw(count)


def _random(stream: str, shape: tuple[int, ...], deviation: float, mean: float = 0.0) -> np.ndarray:
    """float32, uniform around `mean` with that standard deviation."""
    unit = (_raw(stream, math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return ((unit - 0.5) * (deviation * math.sqrt(12.0)) + mean).astype(np.float32).reshape(shape)


def _tokens(stream: str, count: int) -> np.ndarray:
    return (_raw(f"tokens/{stream}", count) >> np.uint64(32)).astype(np.int64).astype(np.int32) % VOCABULARY
