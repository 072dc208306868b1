"""Writes a base model with one adapter merged into its weights: an ordinary Hugging Face folder, which no longer needs LoRA.

`W' = W + s B A` for each module of the adapter (Hu et al. 2021), in float32, tensor by tensor: no more than one of them and the
adapter are in memory. Everything else in the folder is as it was. Runs on NumPy alone.
"""

import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxlora.checkpoint import safetensors_stream
from jaxlora.checkpoint.folder import WEIGHTS, WEIGHTS_INDEX, weight_files
from jaxlora.config import OUTPUT_LAYER, ModelConfig
from jaxlora.errors import SetupError
from jaxlora.files import sync_folder
from jaxlora.peft import LoraAdapter, LoraPair
from jaxlora.peft.tensors import DTYPES, TensorFile

EMBEDDING = "model.embed_tokens.weight"
_HEAD = f"{OUTPUT_LAYER}.weight"
_NO_LIMIT = 1 << 62
# Beside the weights: configuration, tokenizer, chat template, licence. Other formats of the same weights stay out.
_COPIED = {".json", ".jinja", ".txt", ".model", ".md"}


def merge(
    base: pathlib.Path,
    adapter: LoraAdapter,
    output: pathlib.Path,
    dtype: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes the merged checkpoint, whole or not at all.

    Arguments:
        base: the Hugging Face folder that the adapter belongs to.
        output: must not exist yet.
        dtype: `float32`, `bfloat16` or `float16`; default: the type that all weights of the base have, else float32.
        provenance: written to `provenance.json`.

    Raises:
        SetupError: `output` exists, or a tensor of the base is missing or of another type or shape than its config says.
    """
    if os.path.lexists(output):
        raise SetupError(f"{output} exists already; name a folder that does not")
    output.parent.mkdir(parents=True, exist_ok=True)
    incoming = output.with_name(f".{output.name}.incoming-{secrets.token_hex(4)}")
    incoming.mkdir()
    try:
        _Merge(base, adapter, incoming, dtype).run(provenance)
        for file in incoming.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        sync_folder(incoming)
        os.rename(incoming, output)
        sync_folder(output.parent)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


class _Merge:
    def __init__(self, base: pathlib.Path, adapter: LoraAdapter, folder: pathlib.Path, dtype: str | None):
        self._base, self._folder = base, folder
        self._pairs = dict(adapter.modules)
        self._config = json.loads((base / "config.json").read_text())
        # A tied output layer is the embedding; with an adapter of its own it is a matrix of its own.
        self._tied = ModelConfig.from_folder(base).tied
        self._unties = self._tied and OUTPUT_LAYER in self._pairs
        self._files = weight_files(base)
        self._dtype = dtype or self._own_dtype()

    def run(self, provenance: Mapping[str, Any] | None) -> None:
        left = {f"{module}.weight" for module in self._pairs}
        where: dict[str, str] = {}
        for file in self._files:
            written = self._write(file)
            left.difference_update(written)
            where.update(dict.fromkeys(written, file.name))
        if left:
            raise SetupError(f"the base model lacks {', '.join(sorted(left)[:8])}")
        for file in self._base.iterdir():
            licence = file.name.upper().startswith(("LICENSE", "NOTICE"))
            if file.is_file() and (file.suffix in _COPIED or licence) and file.name != WEIGHTS_INDEX:
                shutil.copyfile(file, self._folder / file.name)
        if self._files != [self._base / WEIGHTS]:
            size = sum((self._folder / file.name).stat().st_size for file in self._files)
            self._write_json(WEIGHTS_INDEX, {"metadata": {"total_size": size}, "weight_map": where})
        config = {key: value for key, value in self._config.items() if key not in ("dtype", "torch_dtype", "quantization_config")}
        if self._unties:
            config["tie_word_embeddings"] = False
        self._write_json("config.json", {**config, "torch_dtype": self._dtype})
        if provenance is not None:
            self._write_json("provenance.json", provenance)

    def _own_dtype(self) -> str:
        found = set()
        for file in self._files:
            with _opened(file) as tensors:
                found.update(at.dtype for at in tensors.tensors.values())
        return DTYPES[found.pop()].name if len(found) == 1 and found <= set(DTYPES) else "float32"

    def _write(self, file: pathlib.Path) -> list[str]:
        """Merges one file of weights; gives the names of its tensors."""
        with _opened(file) as tensors:
            shapes = {name: at.shape for name, at in tensors.tensors.items() if not (self._tied and name == _HEAD)}
            if self._unties and EMBEDDING in shapes:
                shapes[_HEAD] = shapes[EMBEDDING]
            safetensors_stream.write(self._folder / file.name, shapes, self._merged(tensors), self._dtype)
        return list(shapes)

    def _merged(self, tensors: TensorFile) -> Iterator[tuple[str, np.ndarray]]:
        dtype, head = np.dtype(DTYPES[_SHORT[self._dtype]]), None
        for name, array in tensors.arrays():
            if array is None:
                raise SetupError(
                    f"{name} of the base model has type {tensors.tensors[name].dtype}; only {', '.join(DTYPES)} can be merged"
                )
            if self._tied and name == _HEAD:  # a copy of the embedding that nobody reads
                continue
            if self._unties and name == EMBEDDING:
                head = _updated(name, array, self._pairs[OUTPUT_LAYER]).astype(dtype)
            pair = self._pairs.get(name.removesuffix(".weight"))
            yield name, (array if pair is None else _updated(name, array, pair)).astype(dtype, copy=False)
        if head is not None:
            yield _HEAD, head

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        (self._folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _opened(file: pathlib.Path) -> TensorFile:
    # The files of the hub's cache are links, which an adapter's files may not be.
    return TensorFile(file.resolve(), max_bytes=_NO_LIMIT)


_SHORT = {dtype.name: short for short, dtype in DTYPES.items()}


def _updated(name: str, weight: np.ndarray, pair: LoraPair) -> np.ndarray:
    """`W + s B A` in float32: `weight` is `[out, in]`, as checkpoints have it."""
    update = pair.b.astype(np.float32) @ pair.a.astype(np.float32)
    if update.shape != weight.shape:
        raise SetupError(f"{name} of the base model has shape {list(weight.shape)}, the adapter is for {list(update.shape)}")
    return weight.astype(np.float32) + np.float32(pair.scale) * update
