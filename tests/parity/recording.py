"""What is kept of the outputs of one architecture, and how two such records are compared. Knows neither torch nor JAX.

Whole logits of every row would be megabytes. A record holds them for two positions, and for every position six numbers that move no
further than the logits do: their maximum, their log-sum-exp and four of them. So a bound on the logits is a bound on the record.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from .checkpoints import LENGTH, VOCABULARY

FOLDER = pathlib.Path(__file__).parents[1] / "references" / "parity"
TOLERANCE = 1e-3  # largest absolute difference of logits in float32
# Two bfloat16 computations that round at independent places differ by about sqrt(2) times what each of them is off float32. Measured:
# 0.6 to 1.1 times by root mean square and 0.4 to 1.1 by maximum, as most roundings are at the same places.
BFLOAT16_RMS_RATIO, BFLOAT16_MAX_RATIO = 1.5, 2.0

_POSITIONS = (LENGTH // 2, LENGTH - 1)
_COLUMNS = tuple(range(VOCABULARY // 8, VOCABULARY, VOCABULARY // 4))


@dataclasses.dataclass(frozen=True)
class Record:
    """The outputs for one architecture. Letters: V variants, R rows of `checkpoints.batch()`, P prompts of each variant.

    Attributes:
        logits: float32 `[V, R, condensed]`: every row under every variant.
        mixed: float32 `[V, condensed]`: one batch in which row k has variant k.
        bfloat16: float32 `[R, condensed]`: the base model with weights and activations in bfloat16.
        greedy: int32 `[V, P, NEW_TOKENS]`: the continuations of `checkpoints.prompts`.
        greedy_logprobs: float32 `[V, P, NEW_TOKENS]`: natural log-probabilities of those tokens.
        facts: the config as Transformers resolves it, and hashes of the folders that the outputs belong to.
    """

    logits: np.ndarray
    mixed: np.ndarray
    bfloat16: np.ndarray
    greedy: np.ndarray
    greedy_logprobs: np.ndarray
    facts: dict[str, Any]

    def save(self, folder: pathlib.Path, architecture: str) -> None:
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "facts"}
        np.savez_compressed(folder / f"{architecture}.npz", **arrays)
        (folder / f"{architecture}.json").write_text(json.dumps(self.facts, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: pathlib.Path, architecture: str) -> "Record":
        facts = json.loads((folder / f"{architecture}.json").read_text())
        with np.load(folder / f"{architecture}.npz", allow_pickle=False) as arrays:
            return cls(**arrays, facts=facts)


def condense(logits: np.ndarray) -> np.ndarray:
    """`[..., LENGTH, VOCABULARY]` -> `[..., condensed]`."""
    logits = np.asarray(logits, np.float32)
    top = logits.max(axis=-1)
    log_sum_exp = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
    summary = np.concatenate([top[..., None], log_sum_exp[..., None], logits[..., _COLUMNS]], axis=-1)
    lead = logits.shape[:-2]
    return np.concatenate([logits[..., _POSITIONS, :].reshape(*lead, -1), summary.reshape(*lead, -1)], axis=-1)


def last_logits(condensed: np.ndarray) -> np.ndarray:
    """`[..., VOCABULARY]` of the last position, from `[..., condensed]`."""
    last = _POSITIONS.index(LENGTH - 1)
    return condensed[..., last * VOCABULARY : (last + 1) * VOCABULARY]


def difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """The largest absolute difference; infinite where anything is not a number."""
    gap = np.abs(ours - reference)
    return float(gap.max()) if np.isfinite(gap).all() else float("inf")


def bfloat16_ratios(ours: np.ndarray, reference: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """How far our bfloat16 outputs are from the reference's, in units of how far the reference's are from its float32 outputs.

    Returns:
        The ratio of the root mean squares, and the ratio of the maxima.
    """
    ours_off, reference_off = ours - reference, reference - exact
    rms = np.sqrt(np.mean(ours_off**2) / np.mean(reference_off**2))
    return float(rms), float(np.abs(ours_off).max() / np.abs(reference_off).max())
