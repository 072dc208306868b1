"""What a run shows: a bar on a terminal, plain lines elsewhere; and the same numbers for TensorBoard, where it is installed."""

import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0  # between lines, where there is no terminal


class Display:
    """Shows how a run goes on. A context manager.

    Arguments:
        total: optimizer steps in all; `done` of them were made before.
        folder: for TensorBoard.
    """

    def __init__(self, total: int, done: int, folder: pathlib.Path):
        self._total, self._last_line = total, 0.0
        self._first: tuple[int, float] | None = None
        self._console = Console(file=sys.stderr)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, transient=False) if self._console.is_terminal else None
        self._task = self._bar.add_task("", total=total, completed=done, numbers="") if self._bar else None
        self._board = _tensorboard(folder)

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if self._board:
            self._board.close()

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def step(self, entry: Mapping[str, Any]) -> None:
        """One more step, with its line of the metrics log."""
        self._scalars(entry)
        numbers = f"loss {entry['loss']:.4f}  {entry.get('tokens_per_second', 0):,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=entry["step"], numbers=numbers)
            return
        now = time.monotonic()
        # Time is counted from the end of the first step, which compiled.
        self._first = self._first or (entry["step"], now)
        if now - self._last_line >= PLAIN_EVERY_S or entry["step"] == self._total:
            self._last_line = now
            first, at = self._first
            left = (now - at) / max(entry["step"] - first, 1) * (self._total - entry["step"])
            self.say(f"step {entry['step']}/{self._total}  {numbers}" + (f"  {left:.0f} s left" if entry["step"] > first else ""))

    def scores(self, entry: Mapping[str, Any]) -> None:
        """An evaluation."""
        self._scalars(entry)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in entry.items() if name.startswith("eval_"))
        self.say(f"step {entry['step']}/{self._total}  {shown}")

    def _scalars(self, entry: Mapping[str, Any]) -> None:
        if self._board:
            for name, value in entry.items():
                if name != "step":
                    self._board.add_scalar(name, value, entry["step"])


def _tensorboard(folder: pathlib.Path) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError:
        return None
    return Writer(str(folder / "tensorboard"))
