"""The same outputs from `jaxlora`, as a `Record`. Knows neither torch nor PEFT."""

import functools
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from jaxlora import lora, model, peft, weights
from jaxlora.backend import Backend
from jaxlora.config import ModelConfig
from jaxlora.engine import Sizes

from . import checkpoints
from .recording import condense
from .serving import answers

MAX_RANK = 16
SIZES = Sizes(slots=4, max_seq_len=256, prefill_chunk=32, lora_slots=3, max_lora_rank=MAX_RANK, output_layer=True, decode_steps=3)
LIMITS = peft.Limits(max_rank=MAX_RANK, max_file_bytes=1 << 22, output_layer=True)
_logits = jax.jit(model.logits, static_argnames="config")


@functools.partial(jax.jit, static_argnames=("config", "layout"))
def _banked_logits(
    config: ModelConfig, layout: lora.BankLayout, base: weights.Weights, bank: lora.Bank, tokens: np.ndarray, slots: np.ndarray
) -> jax.Array:
    return model.logits(config, base, tokens, lora.RowAdapters(layout, bank, slots))


class Ours:
    """One architecture with all its adapters, written below `folder` and read back by the library."""

    def __init__(self, architecture: str, folder: pathlib.Path):
        self.architecture = architecture
        self.base_folder = checkpoints.write_checkpoint(folder / checkpoints.BASE, architecture)
        self.adapter_folders = {name: checkpoints.write_adapter(folder / name, architecture, name) for name in checkpoints.ADAPTERS}
        self.config = ModelConfig.from_folder(self.base_folder)
        self.weights = weights.load(self.base_folder, self.config, "float32")
        self.adapters = {name: peft.read(path, self.config, LIMITS) for name, path in self.adapter_folders.items()}

    @functools.cache
    def base(self, dtype: str = "float32", config: ModelConfig | None = None) -> np.ndarray:
        """`[R, condensed]` without an adapter."""
        loaded = self.weights if dtype == "float32" else weights.load(self.base_folder, self.config, dtype)
        return condense(_logits(config or self.config, loaded, checkpoints.batch()))

    def training_form(self, modules: Mapping[str, lora.Pair]) -> np.ndarray:
        """`[R, condensed]` with one adapter for all rows, as training applies it."""
        return condense(_logits(self.config, self.weights, checkpoints.batch(), lora.Adapter.from_pairs(modules)))

    @functools.cache
    def served_form(self, variants: tuple[str, ...]) -> np.ndarray:
        """`[R, condensed]` where row k has `variants[k]`, from a bank on the device, as serving applies it."""
        layout, bank = self._bank
        slots = np.array([-1 if variant == checkpoints.BASE else self._slot(variant) for variant in variants], np.int32)
        return condense(_banked_logits(self.config, layout, self.weights, bank, checkpoints.batch(), slots))

    @functools.cache
    def greedy(self, backend: Backend) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probabilities `[V, P, NEW_TOKENS]`, with all prompts of all variants in one engine.

        It has fewer serving slots than there are prompts and fewer bank slots than adapters, so batches are mixed and adapters are
        evicted and placed again.
        """
        asked = [
            (None if variant == checkpoints.BASE else variant, prompt)
            for variant in checkpoints.VARIANTS
            for prompt in checkpoints.prompts(self.architecture, variant)
        ]
        # In this order neighbours in the queue have different adapters.
        order = sorted(range(len(asked)), key=lambda place: place % checkpoints.PROMPTS)
        loaded = weights.load(self.base_folder, self.config, "float32", packing=backend.packing)
        found = answers(self.config, loaded, backend, SIZES, self.adapters, [asked[place] for place in order], checkpoints.NEW_TOKENS)
        by_place = dict(zip(order, found, strict=True))
        rows = [by_place[place] for place in range(len(asked))]
        shape = (len(checkpoints.VARIANTS), checkpoints.PROMPTS, checkpoints.NEW_TOKENS)
        tokens = np.array([[token.id for token in row] for row in rows]).reshape(shape)
        return tokens, np.array([[token.logprob for token in row] for row in rows], np.float32).reshape(shape)

    @functools.cache
    def first_tokens(self, backend: Backend, dtype: str) -> list[dict[int, float]]:
        """For each row of the batch as a prompt: the best next tokens of the base model with their log-probabilities."""
        loaded = weights.load(self.base_folder, self.config, dtype, packing=backend.packing)
        rows = [(None, row.tolist()) for row in checkpoints.batch()]
        return [dict(tokens[0].top) for tokens in answers(self.config, loaded, backend, SIZES, {}, rows, 1, dtype)]

    def _slot(self, adapter: str) -> int:
        # Not in the order of the table, and not from 0: a slot is where an adapter lies, not what it is.
        return len(self.adapters) - list(self.adapters).index(adapter)

    @functools.cached_property
    def _bank(self) -> tuple[lora.BankLayout, lora.Bank]:
        layout = lora.BankLayout.of(self.config, MAX_RANK, "float32", output_layer=True)
        bank = lora.Bank.empty(layout, len(self.adapters) + 1)
        for name, adapter in self.adapters.items():
            vector = layout.pack(adapter.modules, layout.max_rank, layout.size)
            bank = lora.put(bank, vector, self._slot(name), adapter.rank)
        return layout, bank
