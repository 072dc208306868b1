"""What a run shows while it goes on, and what it leaves to look at afterwards."""

import pathlib
import sys
import types
from typing import Any

import pytest

from training import progress
from training.curve import draw
from training.progress import Display


def entry(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "tokens_per_second": 1234.5}


def test_without_a_terminal_there_are_lines_now_and_then(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Display(8, 2, tmp_path) as display:
        for step in range(3, 9):
            now[0] += 4 if step > 3 else 60  # it compiled
            display.step(entry(step))
        display.scores({"step": 8, "eval_loss": 0.25, "eval_exact_match": 1.0})
    assert capsys.readouterr().err.splitlines() == [
        "step 3/8  loss 0.3333  1,234 tokens/s",
        "step 6/8  loss 0.1667  1,234 tokens/s  8 s left",
        "step 8/8  loss 0.1250  1,234 tokens/s  0 s left",
        "step 8/8  eval_loss 0.2500  eval_exact_match 1.0000",
    ]


def test_on_a_terminal_there_is_a_bar(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with Display(4, 0, tmp_path) as display:
        display.step(entry(4))
        display.say("a line")
    shown = capsys.readouterr().err
    assert "4/4" in shown and "loss 0.2500  1,234 tokens/s" in shown and "a line" in shown


def test_the_same_numbers_go_to_tensorboard(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []
    closed: list[str] = []

    class Writer:
        def __init__(self, folder: str):
            self.folder = folder

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            closed.append(self.folder)

    summary = types.ModuleType("tensorboard.summary")
    summary.Writer = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", summary)
    with Display(4, 0, tmp_path) as display:
        display.step(entry(2))
        display.scores({"step": 2, "eval_loss": 3.0})
    assert written == [("loss", 0.5, 2), ("tokens_per_second", 1234.5, 2), ("eval_loss", 3.0, 2)]
    assert closed == [str(tmp_path / "tensorboard")]


def test_the_curve_is_drawn_from_the_log_and_from_an_empty_one(tmp_path: pathlib.Path) -> None:
    for entries in ([entry(1), entry(2), {"step": 2, "eval_loss": 0.4}], []):
        draw(entries, tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
