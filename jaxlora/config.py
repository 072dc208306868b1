"""The shape of a base model, read from a Hugging Face `config.json`. Knows no arrays and imports no JAX."""

import dataclasses
import json
import math
import pathlib
from typing import Any

from jaxlora.errors import SetupError

SUPPORTED = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
OUTPUT_LAYER = "lm_head"
_PATHS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: `kind` is `default`, `linear` or `llama3`; the rest are the numbers of that kind."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder layer: its short name, its path inside the layer, and its sizes."""

    name: str
    path: str
    in_features: int
    out_features: int


@dataclasses.dataclass(frozen=True)
class LinearAt:
    """One linear layer of the model: `layer` is None for the output layer."""

    layer: int | None
    name: str
    in_features: int
    out_features: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family. Hashable, so that it can be a static argument of `jax.jit`.

    `windows` holds a sliding window in tokens for each layer (0: attends to everything before).
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    max_positions: int
    eos_token_ids: tuple[int, ...] = ()

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of every decoder layer, in the order of computation."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sizes = {
            "q_proj": (self.hidden_size, q),
            "k_proj": (self.hidden_size, kv),
            "v_proj": (self.hidden_size, kv),
            "o_proj": (q, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }
        return tuple(Linear(name, _PATHS[name], *size) for name, size in sizes.items())

    def names(self, layer: int | None) -> tuple[str, ...]:
        """The names of the linear layers of a decoder layer, or of the output layer."""
        return (OUTPUT_LAYER,) if layer is None else tuple(linear.name for linear in self.linears)

    def module_path(self, layer: int | None, name: str) -> str:
        """The Hugging Face path of a linear layer, for example `model.layers.3.self_attn.q_proj`; `layer` is None for `lm_head`."""
        return OUTPUT_LAYER if layer is None else f"model.layers.{layer}.{_PATHS[name]}"

    def linear_paths(self) -> dict[str, LinearAt]:
        """Every linear layer by its Hugging Face module path, the output layer included."""
        paths = {
            self.module_path(layer, linear.name): LinearAt(layer, linear.name, linear.in_features, linear.out_features)
            for layer in range(self.num_layers)
            for linear in self.linears
        }
        paths[OUTPUT_LAYER] = LinearAt(None, OUTPUT_LAYER, self.hidden_size, self.vocab_size)
        return paths

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "ModelConfig":
        """Reads `config.json`, and the stop tokens of `generation_config.json` where there is one.

        Raises:
            SetupError: no readable config, an architecture that is not supported, or values that this code can't honour.
        """
        folder = pathlib.Path(folder)
        config = _read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        if generation.is_file():
            eos = _read_json(generation).get("eos_token_id")
            if eos is not None:
                config = {**config, "eos_token_id": eos}
        return cls.from_dict(config)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelConfig":
        """The same from a parsed `config.json`, of Transformers 4 or 5."""
        architecture = next((SUPPORTED[name] for name in config.get("architectures") or [] if name in SUPPORTED), None)
        if architecture is None:
            named = ", ".join(config.get("architectures") or []) or config.get("model_type") or "none"
            raise SetupError(f"architecture {named} is not supported; supported are: {', '.join(SUPPORTED)}")
        problems: list[str] = []
        config = {**_CLASS_DEFAULTS[architecture], **config}
        missing = [key for key in _REQUIRED if key not in config]
        if missing:
            raise SetupError(f"config.json lacks {', '.join(missing)}")
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            problems.append(f"hidden_act {config['hidden_act']!r} is not supported; supported is: silu")
        if config.get("quantization_config"):
            problems.append("quantized checkpoints are not supported; convert the weights to float32 or bfloat16")
        rope = _rope(config, problems)
        num_heads = config["num_attention_heads"]
        num_kv_heads = config.get("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            problems.append(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
        head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
        eos = config.get("eos_token_id")
        eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        outside = [token for token in eos if not 0 <= token < config["vocab_size"]]
        if outside:
            problems.append(f"eos_token_id {outside} is not between 0 and {config['vocab_size'] - 1}")
        if head_dim % 2:
            problems.append(f"head_dim {head_dim} is odd")
        if problems:
            raise SetupError("\n".join(problems))
        bias = bool(config.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=rope,
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "qwen2" or (architecture in ("llama", "qwen3") and bias),
            output_bias=architecture in ("llama", "qwen3") and bias,
            mlp_bias=architecture == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=architecture == "qwen3",
            windows=_windows(architecture, config),
            max_positions=int(config["max_position_embeddings"]),
            eos_token_ids=eos,
        )


# What the configuration classes of Transformers fill in for keys that a `config.json` leaves out.
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise SetupError(f"{path} does not exist: not a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise SetupError(f"{path} can't be read: {error}") from None


def _rope(config: dict[str, Any], problems: list[str]) -> Rope:
    # Transformers 5 writes `rope_parameters`; Transformers 4 wrote `rope_theta` and, for scaling, `rope_scaling`.
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        problems.append(f"rope type {kind!r} is not supported; supported are: default, linear, llama3")
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append("partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return Rope(theta)
    rope = Rope(
        theta,
        kind,
        float(scaling.get("factor", 1.0)),
        float(scaling.get("low_freq_factor", 1.0)),
        float(scaling.get("high_freq_factor", 4.0)),
        int(scaling.get("original_max_position_embeddings", config["max_position_embeddings"])),
    )
    if not (math.isfinite(rope.factor) and rope.factor > 0):
        problems.append(f"rope factor {rope.factor} is not a positive number")
    return rope


def _windows(architecture: str, config: dict[str, Any]) -> tuple[int, ...]:
    layers, window = config["num_hidden_layers"], config.get("sliding_window") or 0
    if architecture == "mistral":
        return (window,) * layers
    if architecture in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        kinds = config.get("layer_types")
        if kinds is not None:
            return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
        first = config.get("max_window_layers", 28)
        return tuple(window if layer >= first else 0 for layer in range(layers))
    return (0,) * layers
