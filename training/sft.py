"""Supervised fine-tuning: `python -m training.sft --data my.jsonl --name alice/sql`.

Data: see `training.data`. Learns completions, or the assistant's turns.
"""

from jaxlora import allocator

if __name__ == "__main__":
    allocator.restart()  # first, as what follows takes seconds

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
    encoder = task.encoder
    learned, held_out = task.examples(lambda record: (encoder.example(record), encoder.question(record)))
    source = task.batches([example for example, _ in learned], task.options.max_length if task.options.packing else None)
    questions = [question for _, question in held_out if question is not None]
    return Method("sft", sft, source, task.held_out([example for example, _ in held_out]), questions)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script("sft", SftOptions, __doc__.splitlines()[0], build, argv)


if __name__ == "__main__":
    sys.exit(main())
