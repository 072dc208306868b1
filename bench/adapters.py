"""Random adapters for all systems, in a store that both of ours read, and as the PEFT folders that lie in it.

All linear layers, non-zero, half of rank 8 and half of rank 16, from a seed. Their size is such that the answers change and stay words.
"""

import dataclasses
import hashlib
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxlora import adapters, peft
from jaxlora.config import ModelConfig
from jaxlora.settings import Settings
from server import repository

COUNT, RANKS = 16, (8, 16)
USER = "bench"
B_SCALE = 0.02


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model repository whose store holds the adapters `names`; `folders` are their PEFT folders."""

    repository: pathlib.Path
    names: list[str]
    folders: list[pathlib.Path]

    @property
    def store(self) -> pathlib.Path:
        return self.repository / repository.STORE


def random_adapter(config: ModelConfig, rank: int, seed: int, dtype: Any = np.float32) -> peft.LoraAdapter:
    """An adapter of every linear layer of the decoder."""
    targets = sorted(linear.name for linear in config.linears)
    raw = peft.new_config(r=rank, lora_alpha=2 * rank, target_modules=targets)
    parsed = peft.AdapterConfig.from_dict(raw)
    random = np.random.default_rng((seed, rank))
    modules = {}
    for module, at in config.linear_paths().items():
        if parsed.selects(module):
            a = random.standard_normal((rank, at.in_features), np.float32) / np.float32(np.sqrt(at.in_features))
            b = random.standard_normal((at.out_features, rank), np.float32) * np.float32(B_SCALE)
            modules[module] = peft.LoraPair(a.astype(dtype), b.astype(dtype), parsed.scale(module))
    return peft.LoraAdapter(modules, raw)


def cache_of(settings: Settings, model: pathlib.Path) -> pathlib.Path:
    """The folder for adapters and files that fit this base model."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in model.iterdir() if path.suffix in (".json", ".safetensors"))
    key = hashlib.sha256(repr((str(model), files)).encode()).hexdigest()[:16]
    return settings.cache_dir / "bench" / key


def prepare(folder: pathlib.Path, config: ModelConfig, settings: Settings, ranks: Sequence[int], dtype: Any = np.float32) -> Prepared:
    """A repository in `folder` whose adapters have these ranks, checked and listed in the catalogue. What is there already is kept."""
    models = folder / "model_repository"
    fresh = repository.copy(folder / "model_repository.new")
    store = models / repository.STORE
    if (store / "users").exists():
        (store / "users").rename(fresh / repository.STORE / "users")
    shutil.rmtree(models, ignore_errors=True)
    fresh.rename(models)
    names = [f"{USER}/r{rank}-{index}" for index, rank in enumerate(ranks)]
    paths = [store / "users" / USER / "adapters" / name.split("/")[1] / "1" for name in names]
    for index, (name, path, rank) in enumerate(zip(names, paths, ranks)):
        if not path.exists():
            adapters.publish(random_adapter(config, rank, index, dtype), name, store)
    adapters.refresh(store, adapters.catalogue_path(settings.cache_dir, store), config, peft.Limits.of(settings))
    return Prepared(models, names, paths)


def sixteen() -> list[int]:
    """The ranks of the adapters that streams are spread over."""
    return [RANKS[index % len(RANKS)] for index in range(COUNT)]


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
