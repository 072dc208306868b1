"""The library's logits and greedy tokens are those of Transformers and PEFT, for every architecture and kind of LoRA: as recorded
and, where torch is installed, as they answer now.
"""

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest

from jaxlora import peft
from jaxlora.backend import Backend, XlaBackend
from jaxlora.config import ModelConfig

from . import checkpoints, recording
from .checkpoints import ADAPTERS, ARCHITECTURES, BASE, VARIANTS
from .conftest import SOURCES
from .ours import LIMITS, Ours
from .recording import TOLERANCE, Record, difference

OursOf = Callable[[str], Ours]
RecordOf = Callable[[str, str], Record]
# Compiling with XLA takes long. These two have what only attention over the cache does: a window, and heads of another size.
XLA_ARCHITECTURES = ("mistral", "qwen3")
# What a fault must change at the least to be sure of being seen.
VISIBLE = 100 * TOLERANCE


@dataclasses.dataclass
class Case:
    """One architecture: our side, and the reference."""

    ours: Ours
    record: Record


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, source: str, ours_of: OursOf, record_of: RecordOf) -> Case:
    return Case(ours_of(request.param), record_of(source, request.param))


def test_the_folders_are_those_that_were_recorded(case: Case) -> None:
    folders = {BASE: case.ours.base_folder, **case.ours.adapter_folders}
    assert {name: checkpoints.fingerprint(folder) for name, folder in folders.items()} == case.record.facts["fingerprints"]


def test_the_config_means_what_transformers_takes_it_to_mean(case: Case) -> None:
    assert ModelConfig.from_dict(case.record.facts["config"]) == case.ours.config


def test_base_logits(case: Case) -> None:
    assert difference(case.ours.base(), case.record.logits[0]) < TOLERANCE


def test_base_logits_in_bfloat16_are_off_no_further_than_the_rounding(case: Case) -> None:
    rms, largest = recording.bfloat16_ratios(case.ours.base("bfloat16"), case.record.bfloat16, case.record.logits[0])
    assert rms < recording.BFLOAT16_RMS_RATIO
    assert largest < recording.BFLOAT16_MAX_RATIO


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_with_an_adapter_of_the_bank(case: Case, variant: str) -> None:
    reference = case.record.logits[VARIANTS.index(variant)]
    assert difference(case.ours.served_form((variant,) * len(VARIANTS)), reference) < TOLERANCE


def test_logits_of_a_batch_in_which_every_row_has_its_own_adapter(case: Case) -> None:
    assert difference(case.ours.served_form(VARIANTS), case.record.mixed) < TOLERANCE


def test_logits_of_a_mixed_batch_in_another_order(case: Case) -> None:
    order = np.roll(np.arange(len(VARIANTS)), 2)
    reference = case.record.logits[order, np.arange(len(VARIANTS))]
    assert difference(case.ours.served_form(tuple(VARIANTS[variant] for variant in order)), reference) < TOLERANCE


def test_logits_with_an_adapter_as_training_applies_it(case: Case) -> None:
    # One adapter for each architecture, every adapter for one at least: the form depends on the adapter, hardly on the architecture.
    adapter = list(ADAPTERS)[list(ARCHITECTURES).index(case.ours.architecture) % len(ADAPTERS)]
    ours = case.ours.training_form(case.ours.adapters[adapter].modules)
    assert difference(ours, case.record.logits[VARIANTS.index(adapter)]) < TOLERANCE


def test_greedy_tokens_of_the_engine(case: Case, serving_backend: Backend) -> None:
    check_greedy(case, serving_backend)


@pytest.mark.parametrize("architecture", ARCHITECTURES if "fresh" in SOURCES else XLA_ARCHITECTURES)
def test_greedy_tokens_of_the_engine_in_plain_xla(architecture: str, ours_of: OursOf, record_of: RecordOf) -> None:
    check_greedy(Case(ours_of(architecture), record_of("stored", architecture)), XlaBackend())


def check_greedy(case: Case, backend: Backend) -> None:
    tokens, logprobs = case.ours.greedy(backend)
    assert tokens.tolist() == case.record.greedy.tolist()
    # A log-probability is a difference of two numbers that move as far as the logits.
    assert difference(logprobs, case.record.greedy_logprobs) < 2 * TOLERANCE


def test_first_tokens_of_the_engine_in_bfloat16_are_off_no_further_than_the_rounding(case: Case, serving_backend: Backend) -> None:
    ours, reference, exact = [], [], []
    recorded = (log_softmax(recording.last_logits(logits)) for logits in (case.record.bfloat16, case.record.logits[0]))
    for found, in_bfloat16, in_float32 in zip(case.ours.first_tokens(serving_backend, "bfloat16"), *recorded, strict=True):
        ours += found.values()
        reference += in_bfloat16[list(found)].tolist()
        exact += in_float32[list(found)].tolist()
    rms, largest = recording.bfloat16_ratios(np.array(ours), np.array(reference), np.array(exact))
    assert rms < recording.BFLOAT16_RMS_RATIO
    assert largest < recording.BFLOAT16_MAX_RATIO


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_every_adapter_changes_every_row_by_far_more_than_the_tolerance(case: Case) -> None:
    for variant in range(len(VARIANTS)):
        others = np.delete(case.record.logits, variant, axis=0)
        assert np.abs(others - case.record.logits[variant]).max(axis=-1).min() > VISIBLE


# A fault of each kind, put in on purpose: it must be seen.


@pytest.fixture(scope="module")
def llama(ours_of: OursOf, record_of: RecordOf) -> Case:
    return Case(ours_of("llama"), record_of("stored", "llama"))


@pytest.mark.parametrize("adapter", ["rslora", "rslora-patterns"])
def test_alpha_over_r_in_place_of_the_root_is_seen(llama: Case, adapter: str) -> None:
    folder = llama.ours.adapter_folders[adapter].with_name(f"{adapter}-wrong")
    folder.mkdir()
    for file in llama.ours.adapter_folders[adapter].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps({**ADAPTERS[adapter], "use_rslora": False}))
    wrong = llama.ours.training_form(peft.read(folder, llama.ours.config, LIMITS).modules)
    assert difference(wrong, llama.record.logits[VARIANTS.index(adapter)]) > VISIBLE


def test_alpha_without_its_pattern_is_seen(llama: Case) -> None:
    modules = {
        path: dataclasses.replace(pair, scale=ADAPTERS["patterns"]["lora_alpha"] / pair.a.shape[0])
        for path, pair in llama.ours.adapters["patterns"].modules.items()
    }
    wrong = llama.ours.training_form(modules)
    assert difference(wrong, llama.record.logits[VARIANTS.index("patterns")]) > VISIBLE


def test_rows_that_swap_their_adapters_are_seen(llama: Case) -> None:
    swapped = list(VARIANTS)
    swapped[1], swapped[2] = swapped[2], swapped[1]
    gap = np.abs(llama.ours.served_form(tuple(swapped)) - llama.record.mixed).max(axis=-1)
    assert (gap[[1, 2]] > VISIBLE).all()
    assert (np.delete(gap, [1, 2]) < TOLERANCE).all()


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("llama-llama3", {"rope_scaling": None}),
        ("llama-linear", {"rope_scaling": None}),
        ("llama-llama3", {"rms_norm_eps": 1e-5}),
        ("mistral", {"sliding_window": 13}),
        ("qwen2", {"max_window_layers": 1}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 600.0}}),
    ],
)
def test_a_config_read_wrongly_is_seen(ours_of: OursOf, record_of: RecordOf, architecture: str, change: dict) -> None:
    wrong = ModelConfig.from_dict({**ARCHITECTURES[architecture], **change})
    assert difference(ours_of(architecture).base(config=wrong), record_of("stored", architecture).logits[0]) > VISIBLE
