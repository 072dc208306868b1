"""The base model that the server serves, loaded for training."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

from jaxlora import weights
from jaxlora.checkpoint import resolve
from jaxlora.compilation import keep_compiled_programs
from jaxlora.config import ModelConfig
from jaxlora.errors import SetupError
from jaxlora.settings import Settings
from jaxlora.text import Tokenizer
from jaxlora.weights import Weights
from training import machine
from training.machine import Machine


@dataclasses.dataclass(frozen=True)
class Base:
    """The model named by the setting `MODEL`, with its tokenizer. `dtype` is that of the weights."""

    settings: Settings
    folder: pathlib.Path
    config: ModelConfig
    tokenizer: Tokenizer
    dtype: str
    machine: Machine

    @classmethod
    def find(cls, settings: Settings, dtype: str, say: Callable[[str], None]) -> "Base":
        """Reads everything but the weights. Raises SetupError."""
        keep_compiled_programs(settings.cache_dir)
        folder = resolve(settings.model, settings.cache_dir, say)
        chosen = machine.choose(settings.cache_dir / "native", dtype, say)
        return cls(settings, folder, ModelConfig.from_folder(folder), Tokenizer.from_folder(folder), dtype, chosen)

    def load(self) -> Weights:
        """The weights, packed for the machine, on the default device. Raises SetupError."""
        return weights.load(self.folder, self.config, self.dtype, packing=self.machine.packing)

    @property
    def eos(self) -> int:
        """The token that ends a text: the tokenizer's, else the model's first. Raises SetupError where there is none."""
        found = (*self.tokenizer.eos_token_ids, *self.config.eos_token_ids)
        if not found:
            raise SetupError("MODEL: neither the tokenizer nor the config names an end-of-text token")
        return found[0]

    def identity(self) -> dict[str, Any]:
        """What tells this model from another, without reading all of it: its name, its config, the sizes of its weight files."""
        sizes = {path.name: path.stat().st_size for path in sorted(self.folder.glob("*.safetensors"))}
        return {
            "model": self.settings.model,
            "model_config": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest(),
            "model_files": sizes,
        }
