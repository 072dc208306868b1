"""Compiles the kernels into shared libraries, what XLA calls into one and each instruction set into one of its own, once for each compiler, XLA
FFI version and state of the sources.

Knows the compiler and its flags; knows nothing of JAX arrays. A build goes to a temporary file and is renamed into place, so that
processes that start together never see half of one.
"""

import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax.ffi

from jaxlora.files import replace

SOURCES = pathlib.Path(__file__).parent / "src"
ISA_SOURCE = "isa.cc"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-w"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]
CORE = "core"
ISA_FLAGS = {  # the best first
    "amxbf16": [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi", "-mamx-tile", "-mamx-bf16"],
    "avx512fp16": [*AVX512, "-mavx512fp16", "-mavx512vnni"],
    "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma"],
}


class BuildError(Exception):
    """Why there is no library, in one line."""


def compiler() -> list[str]:
    """The C++ compiler's command: `CXX`, or the first of g++, clang++ and c++ on PATH.

    Raises:
        BuildError: there is none.
    """
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler (g++ or clang++) on PATH")


def known() -> list[str]:
    """The instruction sets that this CPU and the compiler know, the best first.

    Raises:
        BuildError: as `libraries`.
    """
    return list(_sets(compiler()))


def preferred() -> list[str]:
    """Those to take where none is asked for."""
    # On Intel's cores a dot product of bfloat16 pairs takes four times as long as a fused multiply-add (Emerald Rapids: 0.65 and 0.16 ns), so
    # that widening the weights is twice as fast.
    isas = known()
    slow = ("avx512bf16",) if "GenuineIntel" in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8") else ()
    return [isa for isa in isas if isa not in slow]


def libraries(
    build_dir: os.PathLike[str] | str, isas: Sequence[str], progress: Callable[[str], None] = lambda line: None
) -> dict[str, pathlib.Path]:
    """The compiled libraries in `build_dir` (made where absent): CORE, and those of these instruction sets. What isn't there is built now, which
    takes some 20 seconds on two cores for one set, and is told to `progress` when it begins.

    Raises:
        BuildError: another kind of machine or CPU, no compiler, a set that one of them lacks, or the compiler's first error.
    """
    command = compiler()
    sets = _sets(command)
    for isa in isas:
        if isa not in sets:
            raise BuildError(f"this CPU or compiler lacks {isa}")
    build_dir, sources = pathlib.Path(build_dir), _digest(command)
    flags = {isa: [*sets[isa], f"-DJAXLORA_ISA={isa}"] for isa in isas} | {CORE: ["-isystem", jax.ffi.include_dir()]}
    paths = {name: build_dir / f"jaxlora-native-{name}-{_key(sources, FLAGS, of_name)}.so" for name, of_name in flags.items()}
    missing = {name: flags[name] for name, path in paths.items() if not path.exists()}
    if missing:
        progress(f"compiling the CPU kernels with {command[0]}, once (half a minute)")
        build_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=build_dir, prefix="build-") as folder:
            for name, built in _build(command, missing, pathlib.Path(folder)).items():
                replace(paths[name], built.read_bytes())
    return paths


def _sets(command: list[str]) -> dict[str, list[str]]:
    """Those of `ISA_FLAGS` that both this CPU and the compiler know."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"no kernels for {platform.system()} on {platform.machine()}")
    macros = _macros(*command)
    found = {
        isa: flags
        for isa, flags in ISA_FLAGS.items()
        if all(f"__{flag[2:].upper().replace('-', '_')}__" in macros for flag in flags if flag.startswith("-m"))
    }
    if not found:
        raise BuildError("this CPU has neither AVX-512 nor AVX2 with FMA")
    return found


@functools.cache
def _macros(*command: str) -> frozenset[str]:
    """What the compiler defines for this CPU."""
    return frozenset(_run([*command, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]).split())


def _digest(command: list[str]) -> str:
    """Of the compiler and all that it reads."""
    digest = hashlib.sha256(_run([*command, "--version"]).encode())
    headers = pathlib.Path(jax.ffi.include_dir())
    for path in [*sorted(SOURCES.iterdir()), *sorted(headers.rglob("ffi/api/*.h"))]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return _key(command, digest.hexdigest())


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _build(command: list[str], flags: dict[str, list[str]], folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Libraries by name. Each is one translation unit, as to read XLA's headers takes longer than to compile a part of the core."""
    core = sorted(path.name for path in SOURCES.glob("*.cc") if path.name != ISA_SOURCE)
    built = {name: folder / f"{name}.so" for name in flags}

    def build(name: str) -> None:
        unit = "".join(f'#include "{source}"\n' for source in (core if name == CORE else [ISA_SOURCE]))
        _run([*command, *FLAGS, *flags[name], "-shared", "-pthread", f"-I{SOURCES}", "-x", "c++", "-", "-o", str(built[name])], unit)

    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        list(compilers.map(build, flags))
    return built


def _run(command: list[str], stdin: str = "") -> str:
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=900)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise BuildError(f"{command[0]} failed: {lines[0].strip()}")
    return done.stdout
