"""The only place that knows PEFT's on-disk format: validate, read, write."""

from jaxlora.peft.check import Limits
from jaxlora.peft.config import AdapterConfig, new_config
from jaxlora.peft.folder import (
    CONFIG_FILE,
    PROVENANCE_FILE,
    WEIGHTS_FILE,
    AdapterInfo,
    LoraAdapter,
    LoraPair,
    check_files,
    read,
    read_published,
    validate,
    write,
)

__all__ = [
    "CONFIG_FILE",
    "PROVENANCE_FILE",
    "WEIGHTS_FILE",
    "AdapterConfig",
    "AdapterInfo",
    "Limits",
    "LoraAdapter",
    "LoraPair",
    "check_files",
    "new_config",
    "read",
    "read_published",
    "validate",
    "write",
]
