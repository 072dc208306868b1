"""The weights of a base model as a pytree, and the one table of their Hugging Face names.

Knows where a tensor of a checkpoint goes; knows nothing of the forward pass.
"""

import json
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from safetensors import SafetensorError, safe_open

from jaxlora.config import OUTPUT_LAYER, ModelConfig
from jaxlora.errors import SetupError


@struct.dataclass
class Dense:
    """A linear layer for XLA: `kernel` is `[in, out]`, the layout that reads at memory speed for few rows; `bias` is `[out]` or None."""

    kernel: Array
    bias: Array | None = None

    def __call__(self, x: Array) -> Array:
        """`[..., in] -> [..., out]` in the dtype of `x`; float32 products are not rounded to a shorter type on accelerators."""
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        y = jnp.matmul(x, self.kernel, precision=precision)
        return y if self.bias is None else y + self.bias


@struct.dataclass
class Layer:
    """One decoder layer. `linears` holds a callable linear layer for each name of `ModelConfig.linears`."""

    input_norm: Array
    post_norm: Array
    linears: dict[str, Dense]
    q_norm: Array | None = None
    k_norm: Array | None = None


@struct.dataclass
class Weights:
    """A whole model: `embed` is `[vocab, hidden]`, `head` maps hidden states to logits (a transposed copy of `embed` where tied)."""

    embed: Array
    layers: tuple[Layer, ...]
    final_norm: Array
    head: Dense

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the activations."""
        return self.embed.dtype


def tensor_table(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its Hugging Face name, with its shape there (linear weights are `[out, in]`)."""
    hidden = config.hidden_size
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for path, at in config.linear_paths().items():
        if path == OUTPUT_LAYER and config.tied:
            continue
        table[f"{path}.weight"] = (at.out_features, at.in_features)
        if has_bias(config, at.name):
            table[f"{path}.bias"] = (at.out_features,)
    for layer in range(config.num_layers):
        for name in _norms(config):
            size = config.head_dim if name.startswith("self_attn.") else hidden
            table[f"model.layers.{layer}.{name}.weight"] = (size,)
    table["model.norm.weight"] = (hidden,)
    return table


def has_bias(config: ModelConfig, name: str) -> bool:
    """Whether the linear layer of that short name has a bias."""
    if name in ("q_proj", "k_proj", "v_proj"):
        return config.qkv_bias
    if name == "o_proj":
        return config.output_bias
    return config.mlp_bias and name in ("gate_proj", "up_proj", "down_proj")


def _norms(config: ModelConfig) -> list[str]:
    names = ["input_layernorm", "post_attention_layernorm"]
    return names + ["self_attn.q_norm", "self_attn.k_norm"] if config.qk_norm else names


def load(
    folder: str | pathlib.Path,
    config: ModelConfig,
    dtype: str = "float32",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Weights:
    """Reads a checkpoint (one file or sharded with an index) tensor by tensor, straight to the default device.

    Arguments:
        folder: Hugging Face folder with `model.safetensors` or `model.safetensors.index.json`.
        dtype: `float32` or `bfloat16`, of the weights on the device.
        progress: called with (tensors read, tensors in all).

    Raises:
        SetupError: names every tensor that is missing, of a wrong shape or of a type that is not floating point.
    """
    table = tensor_table(config)
    tensors: dict[str, Array] = {}
    problems: list[str] = []
    for name, tensor in _tensors(pathlib.Path(folder), set(table), problems):
        if tuple(tensor.shape) != table[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, the config asks for {list(table[name])}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name} has type {tensor.dtype}; only floating-point checkpoints are supported")
        else:
            transpose = tensor.ndim == 2 and name != "model.embed_tokens.weight"
            tensors[name] = _place(tensor, dtype=dtype, transpose=transpose)
        progress(len(tensors), len(table))
    missing = [name for name in table if name not in tensors and not any(problem.startswith(name) for problem in problems)]
    if missing:
        shown = ", ".join(missing[:8])
        problems.append(f"the checkpoint lacks {len(missing)} tensors: {shown}{' ...' if len(missing) > 8 else ''}")
    if problems:
        raise SetupError("\n".join(problems))
    return _assemble(config, tensors)


def _tensors(folder: pathlib.Path, wanted: set[str], problems: list[str]) -> Iterator[tuple[str, Array]]:
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        for file in files:
            if pathlib.PurePath(file).name != file:
                raise SetupError(f"the index names a file outside the model folder: {file!r}")
            # One tensor at a time: the file is memory-mapped, so the host never holds a second copy of the model.
            with safe_open(folder / file, framework="flax") as shard:
                for name in shard.keys():
                    if name in wanted:
                        yield name, shard.get_tensor(name)
    except FileNotFoundError as error:
        problems.append(f"{pathlib.Path(str(error.filename or 'model.safetensors')).name} is missing from the model folder")
    except (SafetensorError, KeyError, ValueError) as error:
        problems.append(f"the checkpoint can't be read: {error}")


def _place(tensor: Array, *, dtype: str, transpose: bool) -> Array:
    return (tensor.T if transpose else tensor).astype(dtype)


def _assemble(config: ModelConfig, tensors: dict[str, Array]) -> Weights:
    embed = tensors["model.embed_tokens.weight"]
    layers = []
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}"
        linears = {
            linear.name: Dense(tensors[f"{prefix}.{linear.path}.weight"], tensors.get(f"{prefix}.{linear.path}.bias"))
            for linear in config.linears
        }
        layers.append(
            Layer(
                input_norm=tensors[f"{prefix}.input_layernorm.weight"],
                post_norm=tensors[f"{prefix}.post_attention_layernorm.weight"],
                linears=linears,
                q_norm=tensors.get(f"{prefix}.self_attn.q_norm.weight"),
                k_norm=tensors.get(f"{prefix}.self_attn.k_norm.weight"),
            )
        )
    head = embed.T if config.tied else tensors[f"{OUTPUT_LAYER}.weight"]
    return Weights(embed, tuple(layers), tensors["model.norm.weight"], Dense(jnp.copy(head)))
