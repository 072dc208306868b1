"""Weights of 8 bits: how far they are from what they stand for, and that a model computes with them and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora import lora, peft, weights
from jaxlora.backend import Backend
from jaxlora.config import ModelConfig
from jaxlora.engine import Sizes
from jaxlora.int8 import Int8, quantize, quantize_ranks
from jaxlora.int8_size import GROUP, SCALE_BYTES
from jaxlora.model import logits
from jaxlora.service import memory_estimate
from jaxlora.settings import Settings
from tests.parity import checkpoints
from tests.parity.serving import answers

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


@pytest.mark.parametrize("rank, k, n", [(1, 1, 1), (8, 100, 33), (3, 576, 1536)])
def test_the_ranks_of_an_adapter_are_rounded_to_the_nearest_of_their_values(rank: int, k: int, n: int) -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((rank, size)) * np.exp(2 * rng.standard_normal((rank, 1))) for size in (k, n))
    a[-1] = 0
    got_a, got_b, scales = quantize_ranks(a, b.astype(jnp.bfloat16))
    assert (got_a.dtype, got_b.dtype, scales.shape) == (np.int8, np.int8, (rank, SCALE_BYTES))
    scales = scales.view(np.float32)
    assert not got_a[-1].any() and not scales[-1].any()
    steps_a, steps_b = (np.abs(values).max(axis=1, keepdims=True) / 127 for values in (a, b.astype(jnp.bfloat16).astype(np.float32)))
    np.testing.assert_allclose(scales, steps_a * steps_b, rtol=1e-6)
    assert (np.abs(got_a * steps_a - a) <= 0.5001 * steps_a).all()
    assert (np.abs(got_b * steps_b - b.astype(jnp.bfloat16).astype(np.float32)) <= 0.5001 * steps_b).all()


def rounded(pair: peft.LoraPair) -> peft.LoraPair:
    a, b, scales = quantize_ranks(pair.a, pair.b.T * np.float32(pair.scale))
    return peft.LoraPair(a * scales.view(np.float32), b.T.astype(np.float32), 1.0)


def test_adapters_of_8_bits_answer_as_what_they_were_rounded_to(tmp_path, backend: Backend) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "base", "llama")
    config = ModelConfig.from_folder(folder)
    names = ("every-linear", "patterns", "rslora-patterns")
    given = {}
    for name in names:
        checkpoints.write_adapter(tmp_path / name, "llama", name)
        given[name] = peft.read(tmp_path / name, config, peft.Limits(16, 1 << 20, output_layer=True))
    near = {name: peft.LoraAdapter({path: rounded(pair) for path, pair in it.modules.items()}, it.config) for name, it in given.items()}
    loaded = weights.load(folder, config, packing=backend.packing)
    sizes = Sizes(slots=2, max_seq_len=256, prefill_chunk=32, lora_slots=2, max_lora_rank=16, output_layer=True)
    prompts = [(name, prompt) for name in names for prompt in checkpoints.prompts("llama", name)[:1]]

    def logprobs(adapters: dict[str, peft.LoraAdapter], int8: bool) -> np.ndarray:
        exact = dataclasses.replace(sizes, int8_adapters=int8)
        return np.array([token.logprob for answer in answers(config, loaded, backend, exact, adapters, prompts, 24) for token in answer])

    got, want = logprobs(given, True), logprobs(near, False)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(got - logprobs(given, False)).max() > 1e-3, "which is not what they were"


def test_the_memory_of_adapters_is_told_before_it_is_taken(tmp_path) -> None:
    config = ModelConfig.from_folder(checkpoints.write_checkpoint(tmp_path / "base", "llama"))
    bank = lora.Bank.empty(lora.BankLayout.of(config, 16, "int8"), 3)
    told = memory_estimate(Settings(lora_quantization="int8", lora_slots=3, max_lora_rank=16), config)["adapters"]
    assert bank.data.nbytes == told
