"""The preference runs that TRL and we both make: the same small model, initial adapter, pairs in the same order, and settings.

Knows neither torch nor JAX.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any

import numpy as np

from tests.parity import checkpoints

FILE = pathlib.Path(__file__).parents[1] / "references" / "training" / "preference.json"
ARCHITECTURE, ADAPTER = "llama", "every-linear"
STEPS, BATCH = 20, 8
LEARNING_RATE, WARMUP_STEPS, MAX_GRAD_NORM = 1e-3, 4, 1.0  # AdamW without weight decay; linear warm-up, then a cosine to zero


@dataclasses.dataclass(frozen=True)
class Run:
    """One run. `trl_loss` is TRL's name of the same loss; `micro_batch` is how many pairs TRL takes at a time."""

    loss: str
    trl_loss: str
    beta: float
    label_smoothing: float = 0.0
    micro_batch: int = 4


RUNS = {
    "sigmoid": Run("sigmoid", "sigmoid", 0.1),
    # TRL smooths no plain DPO loss, but AOT's, which sorts a batch: of batches of one pair it makes the same.
    "sigmoid-smoothed": Run("sigmoid", "aot", 0.1, 0.2, micro_batch=1),
    "robust": Run("robust", "robust", 0.1, 0.1),
    "hinge": Run("hinge", "hinge", 0.05),
    "ipo": Run("ipo", "ipo", 0.1),
}
KTO_BETA, KTO_DESIRABLE, KTO_UNDESIRABLE = 0.1, 1.0, 1.5

# Mean log-probabilities of a token in the chosen and the rejected answer: unlikely, likely, and nearly certain ones.
MEAN_LOGPS = [(-2.0, -3.0), (-0.1, -0.2), (-1e-4, -5.0), (-4.0, -0.01), (-0.69, -0.7), (-30.0, -2.0)]


def pairs() -> list[dict[str, list[int]]]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of every pair, in the order of training."""
    return [
        {
            "prompt_ids": _tokens(f"prompt/{index}", 3, 12),
            "chosen_ids": _tokens(f"chosen/{index}", 2, 16),
            "rejected_ids": _tokens(f"rejected/{index}", 2, 16),
        }
        for index in range(STEPS * BATCH)
    ]


def labelled() -> list[dict[str, Any]]:
    """The same as single answers, half of them desirable; `KL_completion_ids` is the answer to another prompt of the same
    batch."""
    rows = []
    for index, pair in enumerate(pairs()):
        good = index % 3 != 0
        completion = pair["chosen_ids" if good else "rejected_ids"]
        rows.append({"prompt_ids": pair["prompt_ids"], "completion_ids": completion, "label": good})
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        for row, other in zip(batch, [batch[-1], *batch[:-1]]):
            row["KL_completion_ids"] = other["completion_ids"]
    return rows


def learning_rate(step: int) -> float:
    """Of update `step`, from 0, as `get_cosine_schedule_with_warmup` of Transformers has it."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * step / WARMUP_STEPS
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))


def fingerprint() -> str:
    """Tells other data from other results."""
    settings = [MEAN_LOGPS, LEARNING_RATE, WARMUP_STEPS, MAX_GRAD_NORM, BATCH, KTO_BETA, KTO_DESIRABLE, KTO_UNDESIRABLE]
    runs = {name: dataclasses.asdict(run) for name, run in RUNS.items()}
    return hashlib.sha256(json.dumps([pairs(), labelled(), settings, runs], sort_keys=True).encode()).hexdigest()


def _tokens(stream: str, shortest: int, longest: int) -> list[int]:
    seed = int.from_bytes(hashlib.sha256(f"preference/{stream}".encode()).digest()[:16], "little")
    raw = np.random.PCG64(seed).random_raw(longest + 1) >> np.uint64(32)
    length = shortest + int(raw[0]) % (longest - shortest + 1)
    return (raw[1 : length + 1] % checkpoints.VOCABULARY).astype(int).tolist()
