"""SFT for 20 steps against PEFT and torch: the same data, initial adapter and optimizer give the same losses and gradients."""

import importlib.util
import json
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxlora import peft
from jaxlora.lora import Adapter
from jaxlora.model import logits
from training.lora_init import new_adapter, to_peft
from training.losses.sft import sft
from training.machine import Machine
from training.step import StepOptions, make_step, new_state

from . import preference_model
from . import preference_runs as runs
from .preference_model import Model

SOURCES = ("fresh",) if importlib.util.find_spec("torch") else ("stored",)
FILE = runs.FILE.with_name("sft.json")
TOLERANCE = 1e-4  # relative, at any step
DRIFT = 1e-5  # relative, on average over the steps: differences have to come out on both sides


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, machine: Machine) -> Model:
    return preference_model.load(tmp_path_factory.mktemp("model"), machine)


@pytest.fixture(scope="module", params=SOURCES)
def record(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "stored":
        return json.loads(pathlib.Path(FILE).read_text())
    from . import record_sft

    return record_sft.record()


def windows(micro_batches: int) -> list[dict[str, np.ndarray]]:
    found = []
    for step in range(runs.STEPS):
        rows = runs.pairs()[step * runs.BATCH : (step + 1) * runs.BATCH]
        tokens, mask = preference_model.sequences(rows, "chosen_ids")
        found.append(
            {"tokens": tokens.reshape(micro_batches, -1, tokens.shape[1]), "mask": mask.reshape(micro_batches, -1, mask.shape[1])}
        )
    return found


def test_sft_trains_as_in_peft(record: dict[str, Any], model: Model) -> None:
    assert record["data"] == runs.fingerprint() and record["fingerprints"] == model.fingerprints
    train, theirs = preference_model.trainer(model, sft), record["runs"]["sft"]
    ours = train(windows(2))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=TOLERANCE, err_msg=name)
        assert abs(np.mean(ours[name] / np.array(theirs[name]) - 1)) < DRIFT, name
    assert theirs["loss"][-1] != pytest.approx(theirs["loss"][0], rel=1e-2)


@pytest.mark.skipif("fresh" not in SOURCES, reason="PEFT is not installed: `make test-parity` runs this")
def test_peft_answers_as_we_do_with_an_adapter_that_was_trained_here(model: Model, tmp_path: pathlib.Path) -> None:
    import torch
    from peft import PeftModel

    from tests.parity.record import load_base

    raw = peft.new_config(
        r=8, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True, rank_pattern={"v_proj": 3}
    )
    optimizer = optax.adamw(3e-2)
    state = new_state(new_adapter(model.config, raw, 0), optimizer)
    step = make_step(model.config, sft, optimizer, StepOptions(), machine=model.machine)
    for window in windows(2)[:5]:
        state, _ = step(state, model.weights, None, window, jax.random.key(0))
    peft.write(tmp_path, to_peft(state.adapter, raw))

    tokens = windows(1)[0]["tokens"][0]
    read = Adapter.from_pairs(peft.read(tmp_path, model.config, preference_model.LIMITS).modules)
    ours = np.asarray(logits(model.config, model.weights, tokens, read))
    theirs = PeftModel.from_pretrained(load_base(model.folder, torch.float32), tmp_path).eval()
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(input_ids=torch.tensor(tokens).long()).logits.numpy(), atol=1e-3)
    assert np.abs(ours - np.asarray(logits(model.config, model.weights, tokens))).max() > 0.1
