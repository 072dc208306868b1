"""The options of the training scripts: dataclasses that become command lines.

Each field is an option with its meaning; a method's script extends `Options` by its own. Knows no JAX.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import types
import typing
from collections.abc import Sequence
from typing import Any, Self

from client.wire import DEFAULT_URL
from jaxlora.errors import SetupError

STORE = pathlib.Path("model_repository/adapters")


def option(
    default: Any, help: str, *, free: bool = False, low: float | None = None, high: float | None = None, flag: str = ""
) -> Any:
    """A field with its help text. `free` options may change when a run is resumed: what it computes doesn't depend on them (of
    the data files it is the content that counts). A number is at least `low`, at most `high`. `flag` is the value that the option
    has where it is given without one."""
    make = {"default_factory": lambda: default.copy()} if isinstance(default, dict) else {"default": default}
    return dataclasses.field(**make, metadata={"help": help, "free": free, "low": low, "high": high, "flag": flag})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every method has."""

    data: pathlib.Path = option(None, "JSONL file to train on", free=True)
    name: str = option(None, "adapter to train, user/adapter: the result becomes its next version", free=True)
    eval_data: pathlib.Path | None = option(None, "JSONL file of held-out lines", free=True)
    eval_share: float = option(0.0, "share of the lines of --data to hold out, where there is no --eval-data", low=0, high=0.9)
    skip_bad_lines: bool = option(False, "leave out lines that can't be used, instead of stopping")
    max_length: int = option(512, "longest example, in tokens; longer ones are left out", low=2)
    buckets: int = option(3, "lengths that examples are padded to, each with a compiled program of its own", low=1, high=32)

    init: str | None = option(
        None, "adapter version to start from, user/adapter or user/adapter@version; keeps its rank and modules"
    )
    rank: int = option(16, "rank of the adapter", low=1)
    alpha: float = option(32, "alpha of the adapter: its scale is alpha / rank")
    rslora: bool = option(False, "scale is alpha / sqrt(rank)")
    target_modules: str = option(
        "all-linear", "`all-linear`, names with commas between them, or a regular expression for the whole path"
    )
    rank_pattern: dict = option({}, 'ranks of some modules, as JSON: {"q_proj": 8}')
    alpha_pattern: dict = option({}, "the same for alpha")
    dropout: float = option(0.0, "share of the inputs of lora_A that are dropped", low=0, high=0.99)
    neftune: float = option(0.0, "alpha of NEFTune's noise on embeddings, for example 5", low=0)

    epochs: float = option(3.0, "times that the data is gone through", low=0)
    max_steps: int | None = option(None, "optimizer steps, instead of --epochs", low=1)
    batch_size: int = option(16, "examples of an optimizer step", low=1)
    micro_batch_size: int | None = option(
        None, "examples that are computed at once; --batch-size is a multiple of it. Default: 8 or less", low=1
    )
    lr: float = option(3e-4, "largest learning rate", low=0)
    lora_plus: float = option(1.0, "LoRA+: how many times faster B learns than A", low=0)
    optimizer: str = option("adamw", "any optimizer of optax")
    optimizer_args: dict = option({"weight_decay": 0.0}, "its arguments, as JSON")
    schedule: str = option("cosine", "`cosine`, `linear`, `constant`, or any schedule of optax")
    schedule_args: dict = option({}, "its arguments, as JSON")
    warmup: float = option(0.05, "share of the steps in which the learning rate rises", low=0, high=1)
    max_grad_norm: float = option(1.0, "global norm that gradients are clipped to; 0: not at all", low=0)
    dtype: str = option("float32", "float32, bfloat16 or float16 of the base model and the activations; adapters stay in float32")
    remat: bool = option(False, "compute activations again in the backward pass: less memory, more time")
    seed: int = option(0, "of initialisation, data order and noise", low=0)

    eval_every: int | None = option(None, "steps between evaluations; default: once an epoch", low=1)
    eval_first: bool = option(False, "evaluate before the first step as well")
    early_stop: int = option(
        0, "stop after so many evaluations without a better eval_loss, and keep the best adapter; 0: never", low=0
    )
    metric: tuple[str, ...] = option(
        (), "task metric on held-out answers: exact_match, json_valid, slot_f1, bleu, file.py:function or module:function", free=True
    )
    eval_samples: int = option(100, "held-out lines that are answered for --metric", free=True, low=1)
    eval_max_tokens: int = option(128, "longest answer for --metric", free=True, low=1)
    publish_if: tuple[str, ...] = option((), 'publish only if so, for example "eval_loss<1.2"', free=True)
    publish_if_better: str | None = option(
        None,
        "publish only if this score (default eval_loss) is better than that of the served version",
        free=True,
        flag="eval_loss",
    )
    no_publish: bool = option(False, "leave the adapter in the run folder", free=True)

    run: pathlib.Path | None = option(None, "folder of the run; default: runs/<name>/<method>", free=True)
    restart: bool = option(False, "start over: what is in the run's folder is moved aside", free=True)
    checkpoint_every: int = option(50, "steps between checkpoints", free=True, low=1)
    checkpoint_minutes: float = option(5.0, "or minutes between them, whichever comes first", free=True, low=0)
    keep_checkpoints: int = option(2, "checkpoints that are kept", free=True, low=1)
    log_every: int = option(1, "steps between lines of metrics.jsonl", free=True, low=1)

    store: pathlib.Path = option(STORE, "adapter store", free=True)
    url: str = option(DEFAULT_URL, "host:port of the server's gRPC endpoint", free=True)

    @classmethod
    def parse(cls, argv: Sequence[str] | None, description: str) -> Self:
        """Options from a command line; `argv` None: of this process.

        Raises:
            SetupError: names everything that is wrong. Unknown options and --help end the process, as argparse does.
        """
        parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            _add(parser, field, hints[field.name])
        values = vars(parser.parse_args(argv))
        found = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
        problems = found.problems()
        if problems:
            raise SetupError("\n".join(problems))
        return found

    def problems(self) -> list[str]:
        """What is wrong with the values, one line each."""
        found = []
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), field.metadata["low"], field.metadata["high"]
            bounds = f"{low:g} or more" if high is None and low is not None else f"between {low} and {high}"
            if isinstance(value, int | float) and (
                (low is not None and not value >= low) or (high is not None and not value <= high)
            ):
                found.append(f"{_flag(field.name)}: {value} is not {bounds}")
            elif isinstance(value, float) and not math.isfinite(value):
                found.append(f"{_flag(field.name)}: {value} is no finite number")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            found.append(f"--dtype: {self.dtype!r} is none of float32, bfloat16, float16")
        if self.batch_size % self.micro_batch:
            found.append(f"--batch-size: {self.batch_size} is no multiple of --micro-batch-size {self.micro_batch}")
        return found

    @property
    def micro_batch(self) -> int:
        """Examples of a micro-batch: the largest divisor of the batch up to 8, where nothing else was asked for."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        return max(size for size in range(1, 9) if self.batch_size % size == 0)

    def defining(self) -> dict[str, Any]:
        """The options that define what the run computes, as JSON holds them."""
        fields = (field for field in dataclasses.fields(self) if not field.metadata["free"])
        return {field.name: _plain(getattr(self, field.name)) for field in fields}


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    kind = next(
        kind for kind in (typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint]) if kind is not type(None)
    )
    more: dict[str, Any] = {"help": field.metadata["help"], "default": default}
    if kind is bool:
        more |= {"action": "store_true"}
    elif typing.get_origin(kind) is tuple:
        more |= {"action": "extend", "nargs": "+", "type": typing.get_args(kind)[0], "default": list(default)}
    elif kind is dict:
        more |= {"type": _json_object, "metavar": "JSON"}
    else:
        more |= {"type": kind, "required": default is None and type(None) not in typing.get_args(hint)}
    if field.metadata["flag"]:
        more |= {"nargs": "?", "const": field.metadata["flag"]}
    parser.add_argument(_flag(field.name), **more)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where they say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, [], False) else super()._get_help_string(action)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("is no JSON object")
    return value


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, pathlib.Path) else list(value) if isinstance(value, tuple) else value
