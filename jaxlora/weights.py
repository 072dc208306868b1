"""The weights of a base model as a pytree, and the one table of their Hugging Face names.

Knows where a tensor of a checkpoint goes; knows nothing of the forward pass.
"""

import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxlora.checkpoint.tensors import opened
from jaxlora.config import OUTPUT_LAYER, ModelConfig
from jaxlora.int8 import Int8, quantize


@struct.dataclass
class Dense:
    """A linear layer for XLA: `kernel` is `[in, out]`, the layout that reads at memory speed for few rows; `bias` is `[out]` or None."""

    kernel: Array | Int8
    bias: Array | None = None

    def __call__(self, x: Array) -> Array:
        """`[..., in] -> [..., out]` in the dtype of `x`; float32 products are not rounded to a shorter type on accelerators."""
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        kernel = self.kernel.widen(x.dtype) if isinstance(self.kernel, Int8) else self.kernel
        y = jnp.matmul(x, kernel, precision=precision)
        return y if self.bias is None else y + self.bias

    def transposed(self, y: Array) -> Array:
        """`[..., out] -> [..., in]`: y times the transposed weights, in float32."""
        precision = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
        return jnp.einsum("...v,dv->...d", y, self.kernel, precision=precision, preferred_element_type=jnp.float32)


@struct.dataclass
class Layer:
    """One decoder layer. `linears` holds a callable for each group of linear layers that are packed together, by their joined names."""

    input_norm: Array
    post_norm: Array
    linears: dict[str, Any]
    q_norm: Array | None = None
    k_norm: Array | None = None


@struct.dataclass
class Weights:
    """A whole model: `embed` is `[vocab, hidden]`, `head` maps hidden states to logits (a transposed copy of `embed` where tied).

    The activations have the type of the norms, which differs from that of the other weights where kernels widen those as they read.
    """

    embed: Array
    layers: tuple[Layer, ...]
    final_norm: Array
    head: Any


class Packing(Protocol):
    """How linear layers lie in memory. `groups` names the layers of a decoder layer that are packed together, as they share their input."""

    groups: tuple[tuple[str, ...], ...]

    def dense(self, kernels: list[Array] | list[Int8], biases: list[Array | None]) -> Any:
        """One layer from the kernels and biases of a group. Arrays are `[out, in]`, as in a checkpoint, `Int8` is `[in, out]`."""

    def activations(self, dtype: jnp.dtype) -> jnp.dtype:
        """The type of activations and norms for weights of that type."""


class PlainPacking:
    """Each linear layer on its own, activations in the type of the weights."""

    groups = (("q_proj",), ("k_proj",), ("v_proj",), ("o_proj",), ("gate_proj",), ("up_proj",), ("down_proj",))

    def dense(self, kernels: list[Array] | list[Int8], biases: list[Array | None]) -> Dense:
        (kernel,), (bias,) = kernels, biases
        return Dense(kernel if isinstance(kernel, Int8) else kernel.T, bias)

    def activations(self, dtype: jnp.dtype) -> jnp.dtype:
        return dtype


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
    folder: str | pathlib.Path, config: ModelConfig, dtype: str = "float32", packing: Packing | None = None, int8: bool = False
) -> Weights:
    """Reads a checkpoint (one file or sharded with an index) layer by layer, straight to the default device.

    Arguments:
        folder: Hugging Face folder with `model.safetensors` or `model.safetensors.index.json`.
        dtype: `float32` or `bfloat16`, of the weights on the device.
        packing: how linear layers are laid out; by default each on its own, as XLA and training want them.
        int8: linear layers, the output layer too, become `Int8`; biases, norms and the table of embeddings stay of type `dtype`.

    Raises:
        SetupError: names every tensor that is missing, of a wrong shape or of a type that is not floating point.
    """
    packing, table = packing or PlainPacking(), tensor_table(config)

    def tensor(name: str) -> Array | None:
        return jnp.asarray(read(name).astype(dtype, copy=False)) if name in table else None

    def dense(layer: int | None, names: tuple[str, ...]) -> Any:
        paths = [config.module_path(layer, name) for name in names]
        kernels = [quantize(read(f"{path}.weight").T) if int8 else tensor(f"{path}.weight") for path in paths]
        return packing.dense(kernels, [tensor(f"{path}.bias") for path in paths])

    def norm(name: str) -> Array | None:
        found = tensor(f"{name}.weight")
        return None if found is None else found.astype(packing.activations(found.dtype))

    def layer(index: int) -> Layer:
        return Layer(
            input_norm=norm(f"model.layers.{index}.input_layernorm"),
            post_norm=norm(f"model.layers.{index}.post_attention_layernorm"),
            linears={"+".join(names): dense(index, names) for names in packing.groups},
            q_norm=norm(f"model.layers.{index}.self_attn.q_norm"),
            k_norm=norm(f"model.layers.{index}.self_attn.k_norm"),
        )

    def head(embed: Array) -> Any:
        if not config.tied:
            return dense(None, (OUTPUT_LAYER,))
        return packing.dense([quantize(embed.T) if int8 else embed], [None])

    with opened(pathlib.Path(folder), table) as read, ThreadPoolExecutor(os.cpu_count()) as readers:
        embed = tensor("model.embed_tokens.weight")
        packed_head = readers.submit(head, embed)
        layers = tuple(readers.map(layer, range(config.num_layers)))
        return Weights(embed, layers, norm("model.norm"), packed_head.result())
