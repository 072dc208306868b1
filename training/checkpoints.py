"""Checkpoints of a run: everything that the next step depends on, whole or not at all.

`<folder>/<step>/` holds `state.safetensors`, the leaves of the training state by their place in its tree, and `state.json` with
the rest and the hash of both. Written aside, synced, renamed; the newest one whose bytes are those that were written counts. Plain files
rather than Orbax, for the hash: Orbax 0.12 renames into place as well, but restores a file with a flipped bit without a word.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from jaxlora.files import sync_folder, write_synced
from training.keys import is_key

TENSORS, FACTS = "state.safetensors", "state.json"
INCOMING = ".incoming-"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was saved. `state` holds NumPy arrays, and JAX's random keys, in the tree that was given to `load`; `facts` is anything that
    JSON holds."""

    step: int
    state: Any
    facts: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Arguments:
        keep: how many of the newest stay.
        warn: told about a checkpoint that can't be written or read.
    """

    def __init__(self, folder: pathlib.Path, keep: int = 2, warn: Callable[[str], None] = print):
        self._folder, self._keep, self._warn = folder, keep, warn

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> bool:
        """Writes a checkpoint, then removes the oldest. False, with a warning, where the disk refuses: what was there stays."""
        target = self._folder / str(step)
        incoming = self._folder / f"{INCOMING}{step}-{secrets.token_hex(4)}"
        tensors = safetensors.numpy.save({name: np.asarray(leaf) for name, leaf in jax.device_get(_leaves(state)).items()})
        about = {"step": step, "facts": facts}
        about["sha256"] = _digest(tensors, about)
        try:
            incoming.mkdir(parents=True)
            write_synced(incoming / TENSORS, tensors)
            write_synced(incoming / FACTS, json.dumps(about, indent=1).encode())
            sync_folder(incoming)
            if target.exists():
                # Only a checkpoint that could not be read lies where the run arrives again.
                shutil.rmtree(target)
            os.rename(incoming, target)
            sync_folder(self._folder)
        except OSError as error:
            shutil.rmtree(incoming, ignore_errors=True)
            self._warn(f"checkpoint {step} could not be written ({error.strerror}); the run goes on with the one before")
            return False
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self._folder / str(old), ignore_errors=True)
        self._remove_incoming()
        return True

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        try:
            return sorted(int(entry.name) for entry in os.scandir(self._folder) if entry.name.isdecimal())
        except FileNotFoundError:
            return []

    def load(self, like: Any) -> Checkpoint | None:
        """The newest checkpoint that is whole, with a warning for each newer one that isn't; None if there is none.

        Arguments:
            like: a state of the same tree, shapes and types.
        """
        for step in reversed(self.steps()):
            try:
                return self._read(step, like)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                self._warn(f"checkpoint {step} can't be used ({reason}); falling back to the one before")
        return None

    def _read(self, step: int, like: Any) -> Checkpoint:
        folder = self._folder / str(step)
        about, data = json.loads((folder / FACTS).read_bytes()), (folder / TENSORS).read_bytes()
        if about.pop("sha256") != _digest(data, about) or about["step"] != step:
            raise ValueError("its content is not what was written")
        tensors = safetensors.numpy.load(data)
        for name, leaf in _leaves(like).items():
            if tensors[name].shape != leaf.shape or tensors[name].dtype != leaf.dtype:
                raise ValueError(
                    f"{name} is {tensors[name].dtype}{list(tensors[name].shape)}, not {leaf.dtype}{list(leaf.shape)}"
                )
        state = jax.tree_util.tree_map_with_path(lambda path, leaf: _restored(tensors[jax.tree_util.keystr(path)], leaf), like)
        return Checkpoint(step, state, about["facts"])

    def _remove_incoming(self) -> None:
        for entry in list(os.scandir(self._folder)):
            if entry.name.startswith(INCOMING):
                shutil.rmtree(entry.path, ignore_errors=True)


def _digest(tensors: bytes, about: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(tensors)
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()


def _leaves(tree: Any) -> dict[str, Any]:
    """By place in the tree, random keys as their data."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jax.random.key_data(leaf) if is_key(leaf) else leaf for path, leaf in leaves}


def _restored(saved: np.ndarray, like: Any) -> Any:
    return jax.random.wrap_key_data(saved, impl=jax.random.key_impl(like)) if is_key(like) else saved
