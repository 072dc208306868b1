"""What Triton looks at when it is asked to load a model again: the newest modification time below the model's folder, which must have grown."""

import os
import pathlib
import time
from collections.abc import Iterator

MARK = ".newest"
_STEP_NS = 1_000


def outrun(store: pathlib.Path) -> None:
    """Sees to it that the next `load` is heeded although a file in the store has a time to come, from a copy that keeps times or a clock that
    was wrong: until then nothing that is published could be newer. A mark that is newer than everything is; each load makes it anew.

    Raises:
        OSError: the mark can't be written.
    """
    newest = max(_times(store), default=0)
    if newest > time.time_ns():
        mark = store / "users" / MARK
        mark.touch()
        os.utime(mark, ns=(newest + _STEP_NS,) * 2)


def _times(folder: str | os.PathLike[str]) -> Iterator[int]:
    """Modification times of a folder and all that is below it, in nanoseconds. What goes meanwhile, or can't be read, is left out."""
    try:
        yield os.stat(folder).st_mtime_ns
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _times(entry.path)
            continue
        try:
            yield entry.stat().st_mtime_ns
        except OSError:
            continue
