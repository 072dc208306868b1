"""The tensors of an adapter against its config and the base model: everything that does not fit, grouped by kind.

Knows how PEFT names tensors; reads no files.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from jaxlora.config import OUTPUT_LAYER, LinearAt, ModelConfig
from jaxlora.peft.config import AdapterConfig
from jaxlora.peft.patterns import TIME_LIMIT_S, PatternTimeoutError
from jaxlora.peft.tensors import DTYPES, TensorAt, shorten
from jaxlora.settings import Settings

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Limits:
    """The bounds that an adapter has to keep."""

    max_rank: int
    max_file_bytes: int
    output_layer: bool = False

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        return cls(settings.max_lora_rank, settings.max_adapter_file_bytes, bool(settings.lora_output_layer))


def tensor_key(module: str, side: str) -> str:
    """The name of a tensor: `side` is "A" or "B"."""
    return f"base_model.model.{module}.lora_{side}.weight"


def module_of(key: str) -> tuple[str, str] | None:
    """The reverse: (module, side), or None for a name of another form."""
    match = _KEY.fullmatch(key)
    return (match["module"], match["side"]) if match else None


class _Problems:
    """What is wrong, by kind: each kind is one line that lists the first few things it holds for."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[str]] = {}

    def add(self, kind: str, *things: str) -> None:
        if things:
            self._kinds.setdefault(kind, []).extend(things)

    def lines(self) -> list[str]:
        return [f"{kind}: {some(things)}" for kind, things in self._kinds.items()]


def check_tensors(tensors: Mapping[str, TensorAt], config: AdapterConfig | None, model: ModelConfig, limits: Limits) -> list[str]:
    found = _Problems()
    linears = model.linear_paths()
    sides: dict[str, dict[str, TensorAt]] = {}
    if not tensors:
        found.add("no tensors in", "adapter_model.safetensors")
    for name, at in tensors.items():
        if at.dtype not in DTYPES:
            found.add(f"types other than {', '.join(DTYPES)}", f"{name} is {at.dtype}")
        module, side = module_of(name) or ("", "")
        layer = _LAYER.match(module)
        if module in linears:
            sides.setdefault(module, {})[side] = at
        elif layer and int(layer[1][:9]) >= model.num_layers:
            found.add(f"layers that do not exist (this base model has {model.num_layers})", name)
        elif ".lora_" not in name:
            found.add("weights of whole modules, which are not applied (to leave them out: save_embedding_layers=False)", name)
        else:
            found.add("keys that are no LoRA weights of a linear layer of this base model", name)
    if OUTPUT_LAYER in sides and not limits.output_layer:
        found.add("the output layer is not adapted by this server (LORA_OUTPUT_LAYER=1 allows it)", OUTPUT_LAYER)
    for module, pair in sides.items():
        _check_pair(found, module, pair, linears[module], limits)
    if config is not None:
        try:
            _check_against_config(found, sides, config, linears)
        except PatternTimeoutError:
            found.add(f"regular expressions that take longer than {TIME_LIMIT_S:g} s", "adapter_config.json")
    return found.lines()


def _check_pair(found: _Problems, module: str, pair: Mapping[str, TensorAt], linear: LinearAt, limits: Limits) -> None:
    if len(pair) == 1:
        found.add("lora_A without lora_B" if "A" in pair else "lora_B without lora_A", module)
        return
    a, b = pair["A"].shape, pair["B"].shape
    shapes = f"{module} has lora_A {list(a)} and lora_B {list(b)}"
    if len(a) != 2 or len(b) != 2 or 0 in a or 0 in b:
        found.add("shapes that are not [r, in] and [out, r]", shapes)
        return
    if a[1] != linear.in_features or b[0] != linear.out_features:
        found.add(
            "sizes that do not fit this base model", f"{shapes}, not [r, {linear.in_features}] and [{linear.out_features}, r]"
        )
    if a[0] != b[1]:
        found.add("different ranks of lora_A and lora_B", shapes)
    if max(a[0], b[1]) > limits.max_rank:
        found.add(f"ranks over the limit {limits.max_rank} (MAX_LORA_RANK)", f"{module} has {max(a[0], b[1])}")


def _check_against_config(
    found: _Problems, sides: Mapping[str, Mapping[str, TensorAt]], config: AdapterConfig, linears: Mapping[str, LinearAt]
) -> None:
    found.add("target_modules names no linear layer of this base model", *config.targets_without_a_module(linears))
    selected = {module for module in linears if config.selects(module)}
    found.add(
        "modules that target_modules selects have no weights", *(module for module in linears if module in selected - set(sides))
    )
    found.add("modules with weights are not selected by target_modules", *(module for module in sides if module not in selected))
    for module, pair in sides.items():
        config.scale(module)  # its expressions have to end in time as well
        shape = pair["A"].shape if "A" in pair else ()
        if shape and shape[0] != config.rank(module):
            found.add("ranks that differ from adapter_config.json", f"{module} has {shape[0]}, not {config.rank(module)}")


def some(things: Iterable[str], limit: int = 5) -> str:
    """The first few things for a message, and how many more there are."""
    things = list(things)
    more = f" and {len(things) - limit} more" if len(things) > limit else ""
    return ", ".join(shorten(thing, 200) for thing in things[:limit]) + more
