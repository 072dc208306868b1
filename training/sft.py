"""Supervised fine-tuning: `python -m training.sft --data my.jsonl --name alice/sql`.

Data: see `training.data`. Learns completions, or the assistant's turns.
"""

import dataclasses
import sys
from collections.abc import Sequence

from training.losses.sft import sft
from training.method import Method
from training.options import Options, option
from training.script import run_script
from training.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftOptions(Options):
    """What supervised fine-tuning adds."""

    packing: bool = option(False, "put several examples into one row of --max-length tokens, kept apart by a mask")


def build(task: Task) -> Method:
    """The method for a task. Raises SetupError for data that can't be used."""
    examples, held_out = task.examples(task.encoder.example)
    source = task.batches(examples, task.options.max_length if task.options.packing else None)
    return Method("sft", sft, source, task.held_out(held_out))


def main(argv: Sequence[str] | None = None) -> int:
    return run_script("sft", SftOptions, __doc__.splitlines()[0], build, argv)


if __name__ == "__main__":
    sys.exit(main())
