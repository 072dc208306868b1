"""Large arrays in huge pages, where Linux allows it: weights are read with fewer misses of the address cache, and what a step allocates
costs a few page faults instead of hundreds of thousands.

The C library decides when a process starts (glibc 2.35 or newer, https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html), so this is an environment
variable for the processes that hold a model. Others ignore it.
"""

import os
import sys
from collections.abc import Mapping

_VARIABLE, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with huge pages asked for, unless it already says how it wants them."""
    tunables = environ.get(_VARIABLE, "")
    if _TUNABLE in tunables:
        return dict(environ)
    return {**environ, _VARIABLE: ":".join(filter(None, [tunables, f"{_TUNABLE}=1"]))}


def restart() -> None:
    """Starts this process's program again, as the same process, if it runs without. For the first line of a program."""
    wanted = environment(os.environ)
    if sys.platform == "linux" and wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)
