"""Weights of 8 bits: how far they are from what they stand for, and that a model computes with them and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora import weights
from jaxlora.config import ModelConfig
from jaxlora.int8 import Int8, quantize
from jaxlora.int8_size import GROUP
from jaxlora.model import logits
from jaxlora.service import memory_estimate
from jaxlora.settings import Settings
from tests.parity import checkpoints


@pytest.mark.parametrize("k, n", [(1, 1), (63, 5), (64, 32), (65, 33), (200, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_rounded_to_the_nearest_of_their_group(k: int, n: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((k, n)) * np.exp(3 * rng.standard_normal((1, n))), dtype).at[0].set(0)
    made = quantize(w)
    assert (made.values.shape, made.values.dtype, made.scales.shape) == ((k, n), jnp.int8, (-(-k // GROUP), n))
    off = np.abs(np.asarray(made.widen(jnp.float32)) - np.asarray(w, np.float32))
    step = np.repeat(np.asarray(made.scales, np.float32), GROUP, axis=0)[:k]
    # A scale is rounded to 8 bits, so that the largest weight of a group may lie half of 1/256 beyond it.
    assert (off <= step * (0.5 + 127 / 512)).all()
    assert (off <= step * 0.5001)[np.abs(np.asarray(made.values)) < 127].all()


def test_a_column_has_scales_of_its_own_in_each_group() -> None:
    w = np.ones((2 * GROUP, 2), np.float32)
    w[GROUP:, 1] = 1e-3
    np.testing.assert_allclose(quantize(w).widen(jnp.float32), w, rtol=4e-3)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_model_computes_with_the_widened_weights(tmp_path, architecture: str) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "base", architecture)
    config = ModelConfig.from_folder(folder)
    loaded = weights.load(folder, config, int8=True)
    is_int8 = lambda leaf: isinstance(leaf, Int8)  # noqa: E731
    kernels = [leaf for leaf in jax.tree.leaves(loaded, is_leaf=is_int8) if is_int8(leaf)]
    assert len(kernels) == 7 * config.num_layers + 1, "every linear layer, and the output layer"
    widened = jax.tree.map(lambda leaf: leaf.widen(jnp.float32) if is_int8(leaf) else leaf, loaded, is_leaf=is_int8)
    tokens = checkpoints.batch()
    got, want, exact = (np.asarray(logits(config, it, tokens)) for it in (loaded, widened, weights.load(folder, config)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert 0 < np.linalg.norm(got - exact) < 0.05 * np.linalg.norm(exact)


def test_embeddings_and_norms_keep_their_bits(tmp_path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "base", "llama")
    loaded, tensors = weights.load(folder, ModelConfig.from_folder(folder), int8=True), load_file(folder / "model.safetensors")
    assert np.array_equal(loaded.embed, tensors["model.embed_tokens.weight"])
    assert np.array_equal(loaded.layers[1].input_norm, tensors["model.layers.1.input_layernorm.weight"])


def test_the_memory_of_the_weights_is_told_before_they_are_loaded(tmp_path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "base", "llama")
    config = ModelConfig.from_folder(folder)
    matrices = [leaf for leaf in jax.tree.leaves(weights.load(folder, config, int8=True)) if leaf.ndim > 1]
    told = memory_estimate(Settings(dtype="float32", quantization="int8"), config)["weights"]
    assert sum(leaf.nbytes for leaf in matrices) == pytest.approx(told, rel=0.02)
