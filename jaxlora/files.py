"""Files and folders that appear whole or not at all, also when the machine stops in the middle."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import secrets
from collections.abc import Iterator


def write_synced(path: pathlib.Path, data: bytes) -> None:
    """Writes a file and waits until it is on disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: pathlib.Path, data: bytes) -> None:
    """Writes a file so that a reader sees either the old or the new content."""
    incoming = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        write_synced(incoming, data)
        os.replace(incoming, path)
    except BaseException:
        incoming.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: pathlib.Path) -> None:
    """Waits until the names in a folder are on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path: pathlib.Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: pathlib.Path, create: bool = False) -> Iterator[None]:
    """Holds the exclusive lock of a file or folder among processes and threads; it ends with the process that holds it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def is_locked(path: pathlib.Path) -> bool:
    """Whether someone holds the lock of a file or folder now."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
