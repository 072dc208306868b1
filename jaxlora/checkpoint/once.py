"""Builds a folder once, however many processes ask for it and wherever they are interrupted.

A folder under its final name is whole: it is built beside it under a temporary name, flushed to disk, then renamed. One lock
for all folders of a parent makes others wait instead of building the same again; the operating system releases the lock of a
process that dies, so whoever holds it may remove every temporary folder that was left behind.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from jaxlora.errors import SetupError

_TEMPORARY = ".incoming-"


def build(
    target: pathlib.Path,
    is_whole: Callable[[pathlib.Path], bool],
    make: Callable[[pathlib.Path], None],
    progress: Callable[[str], None] = print,
) -> None:
    """Makes sure that `target` is there and whole.

    Arguments:
        target: the folder's final path.
        is_whole: whether a folder under the final name can be used; one that can't (somebody deleted a file) is built again.
        make: fills the empty folder that it is given.
        progress: called with one line when this process has to wait for another one.

    Raises:
        SetupError: the disk is full, or can't be written to.
    """
    if is_whole(target):
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / ".lock", target.parent.name, progress):
            if not is_whole(target):
                _build_alone(target, make)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SetupError(f"CACHE_DIR: no space left on the disk of {target.parent}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOLCK):
            raise SetupError(f"CACHE_DIR: {target.parent} can't be written to: {error.strerror}") from error
        raise


@contextlib.contextmanager
def _locked(path: pathlib.Path, what: str, progress: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that writes to {what}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_alone(target: pathlib.Path, make: Callable[[pathlib.Path], None]) -> None:
    _remove_temporary(target.parent)
    incoming = target.with_name(f"{_TEMPORARY}{target.name}")
    incoming.mkdir()
    try:
        make(incoming)
        for path in (*incoming.iterdir(), incoming):
            _flush(path)
        if target.exists():
            target.rename(target.with_name(f"{_TEMPORARY}{target.name}.replaced"))
        incoming.rename(target)
        _flush(target.parent)
    finally:
        _remove_temporary(target.parent)


def _remove_temporary(parent: pathlib.Path) -> None:
    for folder in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
