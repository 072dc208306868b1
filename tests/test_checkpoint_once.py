"""A folder that several processes want is built once, and is never seen half done."""

import errno
import multiprocessing
import os
import pathlib
import signal
import time

import pytest

from jaxlora.checkpoint import once
from jaxlora.errors import SetupError


def is_whole(folder: pathlib.Path) -> bool:
    return (folder / "first").is_file() and (folder / "second").is_file()


def make(folder: pathlib.Path) -> None:
    (folder / "first").write_text("1")
    (folder / "second").write_text("2")


def slow_make(folder: pathlib.Path) -> None:
    with (folder.parent.parent / "calls").open("a") as calls:
        calls.write("x")
    (folder / "first").write_text("1")
    time.sleep(0.3)
    (folder / "second").write_text("2")


def build_slowly(target: pathlib.Path) -> None:
    once.build(target, is_whole, slow_make)
    assert is_whole(target)


def stop_half_way(target: pathlib.Path) -> None:
    def make(folder: pathlib.Path) -> None:
        (folder / "first").write_text("1")
        os.kill(os.getpid(), signal.SIGKILL)

    once.build(target, is_whole, make)


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_processes_that_start_together_build_once(tmp_path):
    target = tmp_path / "store" / "model"
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=build_slowly, args=(target,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "calls").read_text() == "x"
    assert names(tmp_path / "store") == [".lock", "model"]


def test_a_killed_build_leaves_nothing_under_the_final_name_and_the_next_one_cleans_up(tmp_path):
    target = tmp_path / "model"
    process = multiprocessing.get_context("spawn").Process(target=stop_half_way, args=(target,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert names(tmp_path) == [".incoming-model", ".lock"]
    once.build(target, is_whole, make)
    assert is_whole(target)
    assert names(tmp_path) == [".lock", "model"]


def test_what_is_whole_is_not_built_again(tmp_path):
    target = tmp_path / "model"
    once.build(target, is_whole, make)
    once.build(target, is_whole, lambda folder: pytest.fail("built again"))


def test_a_folder_that_lost_a_file_is_built_again(tmp_path):
    target = tmp_path / "model"
    once.build(target, is_whole, make)
    (target / "second").unlink()
    (target / "stale").write_text("")
    once.build(target, is_whole, make)
    assert names(target) == ["first", "second"]
    assert names(tmp_path) == [".lock", "model"]


def test_a_failing_build_leaves_nothing(tmp_path):
    def fail(folder: pathlib.Path) -> None:
        (folder / "first").write_text("1")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        once.build(tmp_path / "model", is_whole, fail)
    assert names(tmp_path) == [".lock"]


def test_a_full_disk_and_a_folder_that_can_not_be_written_are_one_clear_line(tmp_path):
    def full(folder: pathlib.Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SetupError, match="CACHE_DIR: no space left"):
        once.build(tmp_path / "model", is_whole, full)
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="CACHE_DIR: .*can't be written"):
        once.build(tmp_path / "file" / "model", is_whole, make)
