"""Reward functions that the tests of GRPO name on a command line."""

import os
import pathlib
import signal


def even(completions: list[str], **columns: list) -> list[float]:
    """The share of even digits."""
    return [sum(char in "02468" for char in text) / max(len(text), 1) for text in completions]


def even_until_stopped(completions: list[str], stop_at: list[str], **columns: list) -> list[float]:
    """The same; asks this process to end, once, when the file `stop_at` says 1 and counts it down before."""
    path = pathlib.Path(stop_at[0])
    if path.exists():
        left = int(path.read_text()) - 1
        path.write_text(str(left))
        if left == 0:
            path.unlink()
            os.kill(os.getpid(), signal.SIGTERM)
    return even(completions)


def broken_at_last(completions: list[str], **columns: list) -> list[float]:
    """Raises."""
    raise RuntimeError("no judge today")
