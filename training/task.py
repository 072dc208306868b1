"""What a training script does around the trainer: read options, base model and data; train; judge; publish.

A method's script says how to turn records into examples, and which loss and source to use: `run_script(options, description,
build)`.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxlora import peft
from jaxlora.adapters import AdapterName
from jaxlora.errors import AdapterInvalid, ServingError, SetupError
from jaxlora.files import sha256
from jaxlora.lora import Adapter
from jaxlora.settings import Settings
from jaxlora.weights import Weights
from server import repository
from training.base import Base
from training.batches import Batches, choose_buckets
from training.data import Encoder
from training.lora_init import new_adapter
from training.method import Example, Method
from training.options import Options
from training.records import Record, encode_all
from training.run_folder import RunFolder
from training.stored import find, read

T = TypeVar("T")
START = "start"  # of a run's config: the version that it starts from
SPLIT = 1  # tells the random numbers that hold lines out from those of the data order


def say(line: str) -> None:
    """One line of what is going on."""
    print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a method builds on: options, the run's folder, base model, and the adapter that training starts from with its
    `adapter_config.json`. `init` is the version that it is, None for a new one."""

    options: Options
    folder: RunFolder
    base: Base
    weights: Weights
    start: Adapter
    lora_config: Mapping[str, Any]
    init: AdapterName | None

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.base.tokenizer, self.base.eos, self.options.max_length)

    def examples(self, encode: Callable[[Record], T]) -> tuple[list[T], list[T]]:
        """The lines to train on and those held out, each through `encode`, which raises BadLine or TooLong.

        Raises:
            SetupError: names the lines that can't be used.
        """
        options = self.options
        found = encode_all(options.data, encode, skip_bad=options.skip_bad_lines, say=say)
        if options.eval_data is not None:
            return found, encode_all(options.eval_data, encode, skip_bad=options.skip_bad_lines, say=say)
        count = min(max(round(options.eval_share * len(found)), options.eval_share > 0), len(found) - 1)
        order = np.random.Generator(np.random.PCG64([options.seed, SPLIT])).permutation(len(found))
        held_out = set(order[:count].tolist())
        return (
            [example for at, example in enumerate(found) if at not in held_out],
            [example for at, example in enumerate(found) if at in held_out],
        )

    def batches(self, examples: Sequence[Example], pack_length: int | None = None) -> Batches:
        """What to train on, in windows of a step."""
        size = self.options.micro_batch
        return Batches(
            examples,
            micro_batches=self.options.batch_size // size,
            micro_batch_size=size,
            buckets=self._buckets(examples),
            seed=self.options.seed,
            pack_length=pack_length,
        )

    def held_out(self, examples: Sequence[Example]) -> Batches | None:
        """What to evaluate on, in windows of one micro-batch; None for no examples."""
        if not examples:
            return None
        return Batches(
            examples, micro_batches=1, micro_batch_size=self.options.micro_batch, buckets=self._buckets(examples), seed=None
        )

    def _buckets(self, examples: Sequence[Example]) -> tuple[int, ...]:
        return choose_buckets([example.length for example in examples], self.options.buckets)


def load_task(options: Options, script: str) -> Task:
    """Loads the base model and makes or reads the adapter to start from. Raises SetupError."""
    settings = Settings.read(parameters=repository.parameters(repository.REPOSITORY))
    base = Base.find(settings, options.dtype, say)
    if options.max_length > base.config.max_positions:
        raise SetupError(
            f"--max-length: {options.max_length} is over the {base.config.max_positions} positions of the base model"
        )
    name = check_name(options.name)
    folder = RunFolder(options.run or pathlib.Path("runs", name.user, name.adapter, script))
    init = _init(options, folder)
    start, lora_config = _start(options, base, init)
    rank = max(a.shape[0] for a in start.a.values())
    if rank > settings.max_lora_rank:
        raise SetupError(f"--rank: {rank} is over the limit {settings.max_lora_rank} of the server (MAX_LORA_RANK)")
    say(f"loading {settings.model} ({options.dtype})")
    return Task(options, folder, base, base.load(), start, lora_config, init)


def check_name(name: str) -> AdapterName:
    """The name to publish under. Raises SetupError."""
    try:
        parsed = AdapterName.parse(name)
    except ValueError as error:
        raise SetupError(f"--name: {error}") from None
    if parsed.version is not None:
        raise SetupError(f"--name: {name} names a version; the result gets the next one by itself")
    return parsed


def run_config(task: Task, method: Method, script: str) -> dict[str, Any]:
    """Everything that defines what a run computes."""
    files = {"data": task.options.data, "eval_data": task.options.eval_data}
    hashes = {f"{name}_sha256": sha256(path) for name, path in files.items() if path is not None}
    method_facts = {f"method_{name}": value for name, value in method.facts.items()}
    start = {START: task.init and str(task.init)}
    return {"method": script, **task.options.defining(), **start, **task.base.identity(), **hashes, **method_facts}


def _init(options: Options, folder: RunFolder) -> AdapterName | None:
    """The version to start from. A run that goes on starts from the one that it had, whatever was published since."""
    if options.init is None:
        return None
    try:
        name = AdapterName.parse(options.init)
        before = folder.config(options.restart).get(START)
        if before and name.version is None and AdapterName.parse(before).unpinned == name.unpinned:
            return AdapterName.parse(before)
        return find(options.store, name)
    except (ValueError, ServingError) as error:
        raise SetupError(f"--init: {error}") from None


def _start(options: Options, base: Base, init: AdapterName | None) -> tuple[Adapter, Mapping[str, Any]]:
    if init is None:
        modules = options.target_modules
        raw = peft.new_config(
            r=options.rank,
            lora_alpha=options.alpha,
            target_modules=[each.strip() for each in modules.split(",")] if "," in modules or modules in _short_names(base) else modules,
            use_rslora=options.rslora,
            rank_pattern=options.rank_pattern,
            alpha_pattern=options.alpha_pattern,
            lora_dropout=options.dropout,
            base_model=base.settings.model,
        )
        return new_adapter(base.config, raw, options.seed), raw
    try:
        found = read(options.store, init, base.config, base.settings)
    except AdapterInvalid as error:
        raise SetupError(f"--init: {error}") from None
    return Adapter.from_pairs(found.modules), found.config


def _short_names(base: Base) -> set[str]:
    return {at.name for at in base.config.linear_paths().values()}
