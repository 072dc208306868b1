"""The machine: what it is, and its limits as measured: `python -m bench.machine` prints them as JSON.

The limits are what products of matrices can reach at most. Reading memory: the largest value of arrays larger than any cache, one a
core (NumPy's dot product of the same arrays waits for its sums, and reaches two thirds of that). Arithmetic: the fastest large matrix
product of those at hand, by type.
"""

import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

READ_BYTES = 2 << 30
GEMM_SIZE = 2048
REPEAT = 5
LONG_S = 10  # as torch takes for bfloat16 where the CPU has no instructions for it


def describe() -> dict[str, Any]:
    """What the machine is."""
    cpu = _values("/proc/cpuinfo")
    features = [name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16") if name in cpu.get("flags", "").split()]
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "features": features,
        "memory_bytes": int(_values("/proc/meminfo")["MemTotal"].split()[0]) << 10,
        "system": f"{platform.system()} {platform.release()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
        "load_at_start": os.getloadavg()[0],
    }


def read_bandwidth() -> float:
    """Bytes/s that all cores together read from memory."""
    cores = len(os.sched_getaffinity(0))
    slabs = [np.ones(READ_BYTES // 4 // cores, np.float32) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        return READ_BYTES / fastest(lambda: list(pool.map(np.max, slabs)))


def numpy_gemm() -> float:
    """float32 operations/s of NumPy's BLAS."""
    a = np.ones((GEMM_SIZE, GEMM_SIZE), np.float32)
    return 2 * GEMM_SIZE**3 / fastest(lambda: a @ a)


def fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, after one that warms up; of that one, where it takes long."""
    first = _seconds(call)
    return first if first > LONG_S else min(_seconds(call) for _ in range(REPEAT))


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _values(path: str) -> dict[str, str]:
    """The first `name: value` of each name in a file of /proc."""
    found: dict[str, str] = {}
    for line in pathlib.Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


if __name__ == "__main__":
    print(json.dumps({"read_bytes_per_s": read_bandwidth(), "gemm_float32": numpy_gemm()}))
