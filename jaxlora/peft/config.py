"""`adapter_config.json`: the rank and the scale of each module, and which modules an adapter is for.

Semantics: `LoraConfig` of peft 0.21. Knows module names, no tensors.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlora.config import OUTPUT_LAYER
from jaxlora.errors import AdapterInvalid
from jaxlora.peft import patterns
from jaxlora.peft.options import DEFAULTS, refusals, shown
from jaxlora.peft.tensors import shorten

ALL_LINEAR = "all-linear"
MAX_PATTERN_KEYS = 4096


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A config that can be applied: ranks and scales of modules, and which modules it is for."""

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: patterns.KeyTable[int]
    alpha_pattern: patterns.KeyTable[float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    raw: Mapping[str, Any]
    matcher: patterns.Matcher

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "AdapterConfig":
        """From the parsed file. Raises AdapterInvalid with everything in it that can't be applied."""
        if not isinstance(raw, Mapping):
            raise AdapterInvalid(["adapter_config.json is no JSON object"])
        read, matcher = _Reader(raw), patterns.Matcher()
        for refusal in refusals(raw):
            read.problem(refusal)
        config = cls(
            r=read.rank("r"),
            alpha=read.number("lora_alpha"),
            use_rslora=read.flag("use_rslora"),
            rank_pattern=patterns.KeyTable(read.pattern_table("rank_pattern", _is_rank, "a whole number from 1"), matcher),
            alpha_pattern=patterns.KeyTable(read.pattern_table("alpha_pattern", _is_number, "a number"), matcher),
            target_modules=read.modules("target_modules", required=True),
            exclude_modules=read.modules("exclude_modules", required=False),
            layers_to_transform=read.layers(),
            layers_pattern=read.layers_pattern(),
            raw=dict(raw),
            matcher=matcher,
        )
        if isinstance(config.target_modules, str) and (config.layers_to_transform is not None or config.layers_pattern):
            read.problem("layers_to_transform and layers_pattern need target_modules to be a list")
        if read.problems:
            raise AdapterInvalid(read.problems)
        return config

    def rank(self, module: str) -> int:
        """r of one module, from the first key of `rank_pattern` that matches it, else `r`."""
        return self.rank_pattern.get(module, self.r)

    def scale(self, module: str) -> float:
        """alpha / r of one module, or alpha / sqrt(r) with rsLoRA."""
        rank = self.rank(module)
        return self.alpha_pattern.get(module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def selects(self, module: str) -> bool:
        """Whether PEFT would adapt this linear layer of a causal language model."""
        if isinstance(self.exclude_modules, str):
            if self.matcher.full(self.exclude_modules, module):
                return False
        elif patterns.in_list(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == ALL_LINEAR:
                return module != OUTPUT_LAYER
            return self.matcher.full(self.target_modules, module)
        if module in self.target_modules or self.layers_to_transform is None:
            return patterns.in_list(self.target_modules, module)
        layer = patterns.layer_of(module, list(self.layers_pattern), self.matcher)
        return patterns.in_list(self.target_modules, module) and layer in self.layers_to_transform

    def targets_without_a_module(self, modules: Iterable[str]) -> list[str]:
        """The entries of `target_modules` that name none of these modules."""
        modules = list(modules)
        if isinstance(self.target_modules, str):
            found = self.target_modules.lower() == ALL_LINEAR or any(
                self.matcher.full(self.target_modules, name) for name in modules
            )
            return [] if found else [self.target_modules]
        return [item for item in self.target_modules if not any(patterns.in_list([item], name) for name in modules)]


def new_config(
    *,
    r: int,
    lora_alpha: float,
    target_modules: str | Iterable[str],
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    lora_dropout: float = 0.0,
    base_model: str | None = None,
) -> dict[str, Any]:
    """A complete `adapter_config.json` for a new adapter, as PEFT would write it."""
    return canonical(
        DEFAULTS
        | {
            "r": r,
            "lora_alpha": lora_alpha,
            "target_modules": target_modules if isinstance(target_modules, str) else list(target_modules),
            "use_rslora": use_rslora,
            "rank_pattern": dict(rank_pattern or {}),
            "alpha_pattern": dict(alpha_pattern or {}),
            "lora_dropout": lora_dropout,
            "base_model_name_or_path": base_model,
        }
    )


def canonical(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The one way in which a config is written: module lists sorted, alphas as whole numbers where they are."""
    config = dict(raw)
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list | tuple | set | frozenset):
            config[key] = sorted(config[key])
    if "lora_alpha" in config:
        config["lora_alpha"] = _whole_where_it_is(config["lora_alpha"])
    if config.get("alpha_pattern"):
        config["alpha_pattern"] = {key: _whole_where_it_is(alpha) for key, alpha in config["alpha_pattern"].items()}
    return config


class _Reader:
    """Reads fields and collects what is wrong with them; after a problem the value returned is only a stand-in."""

    def __init__(self, raw: Mapping[str, Any]):
        self._raw = raw
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(f"adapter_config.json: {text}")

    def rank(self, key: str) -> int:
        value = self._raw.get(key, DEFAULTS[key])
        if not _is_rank(value):
            self.problem(f"{key} is {shown(value)}, not a whole number from 1")
            return 1
        return value

    def number(self, key: str) -> float:
        value = self._raw.get(key, DEFAULTS[key])
        if not _is_number(value):
            self.problem(f"{key} is {shown(value)}, not a number")
            return 1.0
        return value

    def flag(self, key: str) -> bool:
        value = self._raw.get(key)
        if value is not None and not isinstance(value, bool):
            self.problem(f"{key} is {shown(value)}, not true or false")
        return value is True

    def pattern_table(self, key: str, valid: Any, what: str) -> dict[str, Any]:
        table = self._raw.get(key) or {}
        if not isinstance(table, dict) or len(table) > MAX_PATTERN_KEYS:
            self.problem(f"{key} is no JSON object of at most {MAX_PATTERN_KEYS} entries")
            return {}
        for pattern, value in table.items():
            if not valid(value):
                self.problem(f"{key}: {shorten(pattern)} is {shown(value)}, not {what}")
            self._check_pattern(key, pattern, patterns.check_key(pattern))
        return table

    def modules(self, key: str, required: bool) -> str | tuple[str, ...]:
        value = self._raw.get(key)
        if isinstance(value, str) and value:
            if value.lower() != ALL_LINEAR:
                self._check_pattern(key, value, patterns.check(value))
            return value
        if (
            isinstance(value, list)
            and value
            and len(value) <= MAX_PATTERN_KEYS
            and all(isinstance(item, str) and item for item in value)
        ):
            return tuple(value)
        if required or value not in (None, [], ""):
            self.problem(f"{key} is {shown(value)}; it has to be a list of module names or a string")
        return ()

    def layers(self) -> tuple[int, ...] | None:
        value = self._raw.get("layers_to_transform")
        numbers = [value] if type(value) is int else value
        if numbers is None or numbers == []:
            return None
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            self.problem(f"layers_to_transform is {shown(value)}, not a list of layer numbers")
            return None
        return tuple(numbers)

    def layers_pattern(self) -> tuple[str, ...]:
        value = self._raw.get("layers_pattern") or []
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or len(names) > 64 or not all(isinstance(name, str) for name in names):
            self.problem(f"layers_pattern is {shown(value)}, not a list of names")
            return ()
        for name in names:
            self._check_pattern("layers_pattern", name, patterns.check_key(name))
        return tuple(names)

    def _check_pattern(self, key: str, written: str, problem: str | None) -> None:
        if problem:
            self.problem(f"{key}: {shorten(written)} {problem}")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 1 << 31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _whole_where_it_is(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
