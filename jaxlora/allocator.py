"""How the C library gives memory to processes with large arrays. Huge pages, where Linux allows them: weights are read with fewer misses
of the address cache, and what a step allocates costs a few page faults instead of hundreds of thousands. A program that trains also
keeps what a step has freed, gigabytes that the kernel would clear again for the next one.

The C library decides when a process starts (glibc 2.35 or newer, https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html), so these are in an
environment variable of the processes that hold a model. Others ignore it.
"""

import os
import sys
from collections.abc import Mapping

_VARIABLE = "GLIBC_TUNABLES"
_HUGE_PAGES = {"glibc.malloc.hugetlb": 1}
# Only the heap of the main thread has no limit of its own, and it alone can keep arrays of any size.
_KEEP = {"glibc.malloc.arena_max": 1, "glibc.malloc.mmap_max": 0, "glibc.malloc.trim_threshold": 2**40}


def environment(environ: Mapping[str, str], keep: bool = False) -> dict[str, str]:
    """`environ` with huge pages asked for. What it already says of a tunable holds.

    Arguments:
        keep: freed memory stays with the process.
    """
    tunables = environ.get(_VARIABLE, "")
    wanted = _HUGE_PAGES | (_KEEP if keep else {})
    missing = [f"{name}={value}" for name, value in wanted.items() if name not in tunables]
    return {**environ, _VARIABLE: ":".join(filter(None, [tunables, *missing]))}


def restart() -> None:
    """Starts this process's program again, as the same process, with huge pages and freed memory kept, if it runs without. For the first
    line of a program that starts no others, before its imports: all that came before is done again."""
    wanted = environment(os.environ, keep=True)
    if sys.platform == "linux" and wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)
