"""What needs Transformers and PEFT themselves: whether the recorded answers still hold, adapters that this project writes, and the
default model. `make test-parity` brings torch and runs these.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: `make test-parity` runs these")

from peft import LoraConfig, get_peft_model  # noqa: E402

from jaxlora import lora, model, peft, weights  # noqa: E402
from jaxlora.backend import Backend  # noqa: E402
from jaxlora.config import ModelConfig  # noqa: E402
from jaxlora.engine import Sizes  # noqa: E402
from jaxlora.text import Tokenizer  # noqa: E402

from . import checkpoints, record  # noqa: E402
from .checkpoints import ARCHITECTURES, NEW_TOKENS, VARIANTS  # noqa: E402
from .ours import Ours  # noqa: E402
from .recording import TOLERANCE, Record, bfloat16_ratios, condense, difference  # noqa: E402
from .serving import answers  # noqa: E402


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_recorded_answers_are_those_of_today(record_of: Callable[[str, str], Record], architecture: str) -> None:
    stored, fresh = record_of("stored", architecture), record_of("fresh", architecture)
    assert stored.facts == fresh.facts
    assert difference(stored.logits, fresh.logits) < TOLERANCE
    assert difference(stored.mixed, fresh.mixed) < TOLERANCE
    assert max(bfloat16_ratios(stored.bfloat16, fresh.bfloat16, fresh.logits[0])) < 0.5
    assert (stored.greedy == fresh.greedy).all()
    assert difference(stored.greedy_logprobs, fresh.greedy_logprobs) < TOLERANCE


def test_peft_answers_the_same_with_adapters_written_by_this_project(
    ours_of: Callable[[str], Ours], record_of: Callable[[str, str], Record], tmp_path: pathlib.Path
) -> None:
    ours, stored = ours_of("llama"), record_of("stored", "llama")
    for name, adapter in ours.adapters.items():
        (tmp_path / name).mkdir()
        peft.write(tmp_path / name, adapter)
    reference = record.with_adapters(record.load_base(ours.base_folder, torch.float32), {name: tmp_path / name for name in ours.adapters})
    tokens = torch.from_numpy(checkpoints.batch()).long()
    for variant, recorded in zip(VARIANTS, stored.logits, strict=True):
        with record.Variant(reference, variant), torch.no_grad():
            assert difference(condense(reference(input_ids=tokens).logits.numpy()), recorded) < TOLERANCE


CHATS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write a Python function that adds the numbers from 1 to 100."}],
    [{"role": "system", "content": "You answer in one sentence."}, {"role": "user", "content": "Why is the sky blue? 天空为什么是蓝色的？"}],
)


class DefaultModel:
    """The default model in Transformers with an adapter that PEFT made and saved, and the same folders read by the library."""

    def __init__(self, folder: pathlib.Path, adapter_folder: pathlib.Path):
        record.settle()
        torch.manual_seed(0)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        fresh = get_peft_model(record.load_base(folder, torch.float32), config)
        for name, parameter in fresh.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.02)
        fresh.save_pretrained(adapter_folder)
        self.reference = record.with_adapters(record.load_base(folder, torch.float32), {"saved": adapter_folder})
        self.reference.generation_config.eos_token_id = None  # every answer has all its tokens
        self.folder, self.config = folder, ModelConfig.from_folder(folder)
        self.weights = weights.load(folder, self.config, "float32")
        self.adapter = peft.read(adapter_folder, self.config, peft.Limits(max_rank=16, max_file_bytes=1 << 30))
        tokenizer = Tokenizer.from_folder(folder)
        self.prompts = [tokenizer.apply_chat_template(chat) for chat in CHATS]

    def answers(self, backend: Backend) -> list[list[int]]:
        """32 tokens for each prompt by the base model, then for each by the adapter, out of mixed batches."""
        longest = max(map(len, self.prompts)) + NEW_TOKENS
        sizes = Sizes(slots=4, max_seq_len=longest, prefill_chunk=32, lora_slots=2, max_lora_rank=16)
        loaded = weights.load(self.folder, self.config, "float32", packing=backend.packing)
        asked = [(name, prompt) for name in (None, "saved") for prompt in self.prompts]
        found = answers(self.config, loaded, backend, sizes, {"saved": self.adapter}, asked, NEW_TOKENS)
        return [[token.id for token in tokens] for tokens in found]

    def reference_answers(self) -> list[list[int]]:
        found = []
        for variant in (checkpoints.BASE, "saved"):
            with record.Variant(self.reference, variant), torch.no_grad():
                found += [record.continuation(self.reference, prompt, f"default model, {variant}")[0] for prompt in self.prompts]
        return found

    def reference_logits(self, variant: str) -> list[np.ndarray]:
        with record.Variant(self.reference, variant), torch.no_grad():
            return [self.reference(input_ids=torch.tensor([prompt])).logits[0].numpy() for prompt in self.prompts]

    def logits(self, adapter: lora.Adapter | None) -> list[np.ndarray]:
        longest = max(map(len, self.prompts))
        tokens = np.array([prompt + [0] * (longest - len(prompt)) for prompt in self.prompts], np.int32)
        out: Any = jax.jit(model.logits, static_argnames="config")(self.config, self.weights, tokens, adapter)
        return [np.asarray(row[: len(prompt)]) for row, prompt in zip(out, self.prompts, strict=True)]


@pytest.fixture(scope="module")
def smollm2(default_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> DefaultModel:
    return DefaultModel(default_model, tmp_path_factory.mktemp("saved"))


def test_logits_of_the_default_model(smollm2: DefaultModel) -> None:
    for ours, reference in zip(smollm2.logits(None), smollm2.reference_logits(checkpoints.BASE), strict=True):
        assert difference(ours, reference) < TOLERANCE


def test_logits_of_the_default_model_with_an_adapter_that_peft_saved(smollm2: DefaultModel) -> None:
    references = smollm2.reference_logits("saved")
    for ours, reference in zip(smollm2.logits(lora.Adapter.from_pairs(smollm2.adapter.modules)), references, strict=True):
        assert difference(ours, reference) < TOLERANCE
    for base, reference in zip(smollm2.reference_logits(checkpoints.BASE), references, strict=True):
        assert difference(base, reference) > 1.0


def test_greedy_tokens_of_the_default_model_with_and_without_an_adapter(smollm2: DefaultModel, serving_backend: Backend) -> None:
    references = smollm2.reference_answers()
    assert references[: len(CHATS)] != references[len(CHATS) :]
    assert smollm2.answers(serving_backend) == references
