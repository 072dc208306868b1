"""Runs `training.sft` and kills the process, as by SIGKILL, at its n-th touch of the disk: `python -m tests.training.killed N
OPTIONS...`.

A touch is a sync or a rename: those are the places where a half-done file, folder or version could be left.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from training import sft


def count_down(touches: int) -> None:
    """Ends this process right before its touch number `touches`, from 1; prints on the way how many there were."""
    left = [touches]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))


if __name__ == "__main__":
    count_down(int(sys.argv[1]))
    sys.exit(sft.main(sys.argv[2:]))
