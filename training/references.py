"""The reference's log-probabilities of all pairs, computed once before training and kept in the cache: it saves a forward pass
of every step.

Worth it from the second epoch on, and for runs that differ in their loss only, for the cache goes by data, model and reference.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from jaxlora.files import replace
from jaxlora.lora import Adapter
from training.batches import choose_buckets, collate
from training.method import Example
from training.scores import Scorer

SIDES = ("chosen", "rejected")


def with_references(
    examples: Sequence[Example],
    score: Scorer,
    reference: Adapter | None,
    *,
    model: Mapping[str, Any],
    folder: pathlib.Path,
    rows: int,
    buckets: int,
    say: Callable[[str], None],
) -> list[Example]:
    """Pairs with `chosen_reference` and `rejected_reference`, see `training.losses.preference`.

    Arguments:
        reference: None is the base model.
        model: tells this base model from every other.
        folder: where results are kept.
        rows: answers that are computed at once.
        buckets: lengths that they are padded to.
    """
    if not examples:
        return []
    path = folder / f"{_fingerprint(examples, reference, model)}.safetensors"
    found = _kept(path, len(examples))
    if found is None:
        say(f"computing the reference's log-probabilities of {len(examples)} pairs")
        found = {side: _answers(examples, side, score, reference, rows, buckets) for side in SIDES}
        folder.mkdir(parents=True, exist_ok=True)
        replace(path, safetensors.numpy.save(found))
    return [
        Example(example.lines, {**example.arrays, **{f"{side}_reference": found[side][at] for side in SIDES}})
        for at, example in enumerate(examples)
    ]


def _answers(
    examples: Sequence[Example], side: str, score: Scorer, reference: Adapter | None, rows: int, buckets: int
) -> np.ndarray:
    """float32 `[N]`: log-probabilities of whole answers."""
    found = np.zeros(len(examples), np.float32)
    lengths = [len(example.arrays[side]) for example in examples]
    sizes = choose_buckets(lengths, buckets)
    for low, size in zip((0, *sizes), sizes):
        places = [at for at, length in enumerate(lengths) if low < length <= size]
        for start in range(0, len(places), rows):
            part = places[start : start + rows]
            arrays = [{"tokens": examples[at].arrays[side], "mask": examples[at].arrays[f"{side}_mask"]} for at in part]
            batch = collate([Example((), each) for each in arrays], rows, size, arrays[0])
            found[part] = score(reference, batch["tokens"][None], batch["mask"][None])[0].sum(axis=1)[: len(part)]
    return found


def _kept(path: pathlib.Path, count: int) -> dict[str, np.ndarray] | None:
    try:
        found = safetensors.numpy.load(path.read_bytes())
    except (OSError, SafetensorError):
        return None
    return found if all(side in found and found[side].shape == (count,) for side in SIDES) else None


def _fingerprint(examples: Sequence[Example], reference: Adapter | None, model: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(model, sort_keys=True).encode())
    if reference is not None:
        digest.update(json.dumps(reference.scales).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(reference)):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
    for example in examples:
        for name, array in sorted(example.arrays.items()):
            digest.update(f"{name} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
