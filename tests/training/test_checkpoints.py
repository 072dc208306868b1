"""Checkpoints: whole or not at all, and the newest whole one counts."""

import errno
import os
import pathlib
from typing import Any

import numpy as np
import pytest

from training import checkpoints
from training.checkpoints import Checkpoints


def state(number: int) -> dict[str, Any]:
    return {"a": {"model.layers.0": np.full((2, 3), number, np.float32)}, "count": np.int32(number), "scale": np.float32(0.1)}


def saved(folder: pathlib.Path, *steps: int, keep: int = 3) -> tuple[Checkpoints, list[str]]:
    warnings: list[str] = []
    found = Checkpoints(folder / "checkpoints", keep, warnings.append)
    for step in steps:
        assert found.save(step, state(step), {"scores": {"eval_loss": step / 3}})
    return found, warnings


def test_what_is_loaded_is_what_was_saved(tmp_path: pathlib.Path) -> None:
    found, warnings = saved(tmp_path, 5, 10)
    loaded = found.load(state(0))
    assert loaded.step == 10 and loaded.facts == {"scores": {"eval_loss": 10 / 3}} and not warnings
    np.testing.assert_array_equal(loaded.state["a"]["model.layers.0"], state(10)["a"]["model.layers.0"])
    assert loaded.state["count"] == 10 and loaded.state["scale"].dtype == np.float32


def test_only_the_newest_are_kept(tmp_path: pathlib.Path) -> None:
    found, _ = saved(tmp_path, 1, 2, 9, 10, keep=2)
    assert found.steps() == [9, 10]


def test_there_may_be_none(tmp_path: pathlib.Path) -> None:
    assert Checkpoints(tmp_path / "none").load(state(0)) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing", "facts", "shape"])
def test_a_damaged_one_falls_back_with_a_warning(tmp_path: pathlib.Path, damage: str) -> None:
    found, warnings = saved(tmp_path, 1, 2)
    path = tmp_path / "checkpoints/2" / ("state.json" if damage == "facts" else "state.safetensors")
    data, like = bytearray(path.read_bytes()), state(0)
    match damage:
        case "flip":
            data[-1] ^= 1
        case "truncate":
            del data[-4:]
        case "empty":
            data.clear()
        case "facts":
            data = data.replace(b"0.666", b"0.667")
        case "shape":
            found.save(2, {**state(2), "count": np.int64(2)}, {})
    if damage == "missing":
        path.unlink()
    elif damage != "shape":
        path.write_bytes(data)
    assert found.load(like).step == 1
    assert len(warnings) == 1 and warnings[0].startswith("checkpoint 2 can't be used")


def test_a_full_disk_keeps_what_was_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, warnings = saved(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "write_synced", full)
    assert not found.save(2, state(2), {})
    assert "could not be written (No space left on device)" in warnings[0]
    assert found.load(state(0)).step == 1
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_what_a_killed_process_left_is_no_checkpoint_and_goes_with_the_next(tmp_path: pathlib.Path) -> None:
    found, warnings = saved(tmp_path, 1)
    (tmp_path / "checkpoints/.incoming-2-abc").mkdir()
    assert found.load(state(0)).step == 1 and not warnings
    found.save(3, state(3), {})
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]
