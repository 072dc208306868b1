"""The small model of the parity tests with its adapter, as training has them, and the step of a run on it."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlora import peft, weights
from jaxlora.config import ModelConfig
from jaxlora.lora import Adapter
from jaxlora.weights import Weights
from tests.parity import checkpoints
from training.losses import Loss
from training.machine import Machine
from training.step import StepOptions, make_step, new_state

from . import preference_runs as runs

LENGTH = 32  # of padded sequences
LIMITS = peft.Limits(max_rank=16, max_file_bytes=1 << 20, output_layer=True)


@dataclasses.dataclass(frozen=True)
class Model:
    """The base model with an adapter; `fingerprints` are those of `tests.parity.checkpoints`."""

    folder: pathlib.Path
    config: ModelConfig
    weights: Weights
    adapter: Adapter
    fingerprints: dict[str, str]
    machine: Machine


def load(folder: pathlib.Path, machine: Machine) -> Model:
    """Written below `folder` and read back, with the weights packed for the machine."""
    base = checkpoints.write_checkpoint(folder / checkpoints.BASE, runs.ARCHITECTURE)
    adapter = checkpoints.write_adapter(folder / runs.ADAPTER, runs.ARCHITECTURE, runs.ADAPTER)
    config = ModelConfig.from_folder(base)
    modules = peft.read(adapter, config, LIMITS).modules
    prints = {path.name: checkpoints.fingerprint(path) for path in (base, adapter)}
    loaded = weights.load(base, config, packing=machine.packing)
    return Model(base, config, loaded, Adapter.from_pairs(modules), prints, machine)


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 `[len(rows), LENGTH]`."""
    return np.array([[*row, *[0] * (LENGTH - len(row))] for row in rows], np.int32)


def sequences(rows: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask `[N, LENGTH]` of the prompts with `row[key]` behind them."""
    tokens = padded([row["prompt_ids"] + row[key] for row in rows])
    mask = padded([[0] * len(row["prompt_ids"]) + [1] * len(row[key]) for row in rows])
    return tokens, mask.astype(np.uint8)


def pair_window(step: int, micro_batches: int = 2) -> dict[str, np.ndarray]:
    """The pairs of one step of a run, `[M, B, ...]`."""
    rows = runs.pairs()[step * runs.BATCH : (step + 1) * runs.BATCH]
    arrays = {}
    for side in ("chosen", "rejected"):
        arrays[side], arrays[f"{side}_mask"] = sequences(rows, f"{side}_ids")
    return {name: array.reshape(micro_batches, -1, *array.shape[1:]) for name, array in arrays.items()}


def trainer(
    model: Model, loss: Loss, prepare: Callable[[dict[str, np.ndarray], Adapter], dict[str, np.ndarray]] | None = None
) -> Callable[[Sequence[dict[str, np.ndarray]]], dict[str, np.ndarray]]:
    """`train(windows)`: loss and gradient norm of each step with the settings of the runs; the reference is the adapter at the
    start.

    Arguments:
        prepare: makes of (window, adapter before the step) the window that the step takes.
    """
    rates = jnp.array([runs.learning_rate(step) for step in range(runs.STEPS)])
    optimizer = optax.adamw(lambda step: rates[step], weight_decay=0.0)
    step = make_step(model.config, loss, optimizer, StepOptions(max_norm=runs.MAX_GRAD_NORM), machine=model.machine)

    def train(windows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        state = new_state(jax.tree.map(jnp.copy, model.adapter), optimizer)
        reports = []
        for window in windows:
            window = prepare(window, state.adapter) if prepare else window
            state, report = step(state, model.weights, model.adapter, window, jax.random.key(0))
            reports.append(report)
        return {name: np.array([getattr(report, name) for report in reports], np.float64) for name in ("loss", "grad_norm")}

    return train
