"""AVX-512 in software (`avx512.h`), for CPUs that lack it: `make test-emulated` runs the kernels' tests for every instruction set."""

import hashlib
import os
import pathlib

from jaxlora.native import build

_HEADER = pathlib.Path(__file__).with_name("avx512.h")
_AVX512 = [*build.ISA_FLAGS["avx2"], "-mf16c", "-O1", "-include", str(_HEADER)]  # the usual -O3 compiles it for minutes
_EMULATED = {
    "amxbf16": [*_AVX512, "-DEMULATE_AMX", "-DEMULATE_BF16", "-DEMULATE_VNNI"],
    "avx512fp16": [*_AVX512, "-DEMULATE_FP16", "-DEMULATE_VNNI"],
    "avx512bf16": [*_AVX512, "-DEMULATE_BF16", "-DEMULATE_VNNI"],
    "avx512": _AVX512,
}


def where_asked() -> None:
    """Has the kernels that this process builds emulate AVX-512, where EMULATE_AVX512 is set."""
    if os.environ.get("EMULATE_AVX512") and not _EMULATED.items() <= build.ISA_FLAGS.items():
        build.ISA_FLAGS.update(_EMULATED)
        # The CPU has what it needs, whatever it says; and libraries of another header are others.
        build.FLAGS += ["-D__builtin_cpu_supports(feature)=1", f"-DEMULATION=0x{hashlib.sha256(_HEADER.read_bytes()).hexdigest()[:8]}"]
