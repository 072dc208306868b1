"""A PEFT LoRA folder: `adapter_config.json` and `adapter_model.safetensors`. Validate, read, write.

Format: peft 0.21. Knows which modules the base model has, from its `ModelConfig`; knows no store, names or versions.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterInvalid
from jaxlora.files import write_synced
from jaxlora.peft.check import Limits, check_tensors, module_of, some, tensor_key
from jaxlora.peft.config import AdapterConfig, canonical
from jaxlora.peft.tensors import TensorFile, open_regular, read_known, strict_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROVENANCE_FILE = "provenance.json"
MAX_JSON_BYTES = 1 << 20
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclasses.dataclass(frozen=True)
class LoraPair:
    """One module: `a [r, in]`, `b [out, r]`, in the type they have on disk; `y = Wx + scale * b @ (a @ x)`."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclasses.dataclass(frozen=True)
class LoraAdapter:
    """An adapter in memory: modules by Hugging Face path, and its `adapter_config.json`."""

    modules: Mapping[str, LoraPair]
    config: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(pair.rank for pair in self.modules.values())

    @property
    def nbytes(self) -> int:
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.modules.values())


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """What a valid folder holds. `target_modules` are the short names that occur, `nbytes` is the size of the weights file."""

    sha256: str
    config_sha256: str
    rank: int
    target_modules: tuple[str, ...]
    num_modules: int
    nbytes: int


def validate(folder: pathlib.Path, model_config: ModelConfig, limits: Limits) -> AdapterInfo:
    """Checks a folder completely, every value of every tensor included. Needs memory for one tensor at a time.

    Raises:
        AdapterInvalid: `problems` names everything that is wrong.
    """
    return _load(folder, model_config, limits, keep=False)[0]


def read(folder: pathlib.Path, model_config: ModelConfig, limits: Limits) -> LoraAdapter:
    """The adapter in a folder, checked as by `validate`.

    Raises:
        AdapterInvalid: anything is wrong.
    """
    return _load(folder, model_config, limits, keep=True)[1]


def read_published(folder: pathlib.Path, sha256: str, config_sha256: str, nbytes: int) -> LoraAdapter:
    """The adapter in a folder that `validate` has accepted. It takes half the time of `read`: what has the hashes that were found then
    needs no other check.

    Arguments:
        sha256, config_sha256, nbytes: as in `AdapterInfo`.

    Raises:
        AdapterInvalid: a file can't be read, or is not the one that was accepted.
    """
    data = _read_small(folder / CONFIG_FILE)
    if hashlib.sha256(data).hexdigest() != config_sha256:
        raise AdapterInvalid([f"{CONFIG_FILE} is not the one that was published"])
    arrays = read_known(folder / WEIGHTS_FILE, nbytes, sha256)
    config = AdapterConfig.from_dict(strict_json(data))
    modules = sorted(key[0] for key in map(module_of, arrays) if key and key[1] == "A")
    pairs = {path: LoraPair(arrays[tensor_key(path, "A")], arrays[tensor_key(path, "B")], config.scale(path)) for path in modules}
    return LoraAdapter(pairs, config.raw)


def write(folder: pathlib.Path, adapter: LoraAdapter, provenance: Mapping[str, Any] | None = None) -> None:
    """Writes the files of an adapter into an existing folder and syncs them to disk. The same adapter gives the same bytes.

    Raises:
        AdapterInvalid: ranks or scales of the modules are not those that the config gives them.
    """
    config = canonical(adapter.config)
    parsed = AdapterConfig.from_dict(config)
    problems = []
    for module, pair in adapter.modules.items():
        if not parsed.selects(module):
            problems.append(f"{module} is not selected by target_modules")
        elif pair.rank != parsed.rank(module) or not math.isclose(pair.scale, parsed.scale(module), rel_tol=1e-6):
            wanted = f"{parsed.rank(module)} and {parsed.scale(module):g}"
            problems.append(f"{module} has rank {pair.rank} and scale {pair.scale:g}, its config gives {wanted}")
    if problems:
        raise AdapterInvalid(problems)
    tensors = {}
    for module, pair in adapter.modules.items():
        tensors[tensor_key(module, "A")] = np.ascontiguousarray(pair.a)
        tensors[tensor_key(module, "B")] = np.ascontiguousarray(pair.b)
    write_synced(folder / CONFIG_FILE, to_json(config))
    write_synced(folder / WEIGHTS_FILE, safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    if provenance is not None:
        write_synced(folder / PROVENANCE_FILE, to_json(provenance))


def read_json_file(path: pathlib.Path) -> tuple[bytes, Any]:
    """A small JSON file: (its bytes, what it says). Raises AdapterInvalid."""
    data = _read_small(path)
    try:
        return data, strict_json(data)
    except ValueError as error:
        raise AdapterInvalid([f"{path.name} is no valid JSON ({error})"]) from None


def _read_small(path: pathlib.Path) -> bytes:
    with open(open_regular(path), "rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise AdapterInvalid([f"{path.name} is larger than {MAX_JSON_BYTES} bytes"])
    return data


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON as PEFT writes it, but tables keep their order: the first key of a pattern that matches counts."""
    return json.dumps(dict(sorted(value.items())), indent=2).encode()


def check_files(folder: pathlib.Path) -> None:
    """Raises AdapterInvalid when a folder can't be an adapter: one of its two files is missing, or there are pickles in it."""
    problems = _pickles(folder)
    problems += [f"{name} is missing" for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if problems:
        raise AdapterInvalid(problems)


def _pickles(folder: pathlib.Path) -> list[str]:
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(PICKLES))
    except OSError as error:
        return [f"the folder can't be read ({error.strerror})"]
    return [f"{some(found)}: pickled files are never loaded; only safetensors are"] if found else []


def _load(folder: pathlib.Path, model: ModelConfig, limits: Limits, keep: bool) -> tuple[AdapterInfo, LoraAdapter]:
    folder = pathlib.Path(folder)
    problems = _pickles(folder)
    config, config_data = None, b""
    try:
        config_data, raw = read_json_file(folder / CONFIG_FILE)
        config = AdapterConfig.from_dict(raw)
    except AdapterInvalid as error:
        problems += error.problems
    arrays: dict[str, np.ndarray] = {}
    not_finite = []
    try:
        with TensorFile(folder / WEIGHTS_FILE, limits.max_file_bytes) as file:
            for name, array in file.arrays():
                if array is not None and not np.isfinite(array).all():
                    not_finite.append(name)
                if array is not None and keep:
                    arrays[name] = array
        if not_finite:
            problems.append(f"NaN or infinity in {some(not_finite)}")
        problems += check_tensors(file.tensors, config, model, limits)
    except AdapterInvalid as error:
        problems += error.problems
    if problems or config is None:
        raise AdapterInvalid(problems)
    modules = sorted({key[0] for key in map(module_of, file.tensors) if key})
    info = AdapterInfo(
        sha256=file.sha256,
        config_sha256=hashlib.sha256(config_data).hexdigest(),
        rank=max(config.rank(module) for module in modules),
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in modules})),
        num_modules=len(modules),
        nbytes=file.size,
    )
    pairs = {}
    for module in modules if keep else ():
        a, b = (arrays[tensor_key(module, side)] for side in "AB")
        pairs[module] = LoraPair(a, b, config.scale(module))
    return info, LoraAdapter(pairs, config.raw)
