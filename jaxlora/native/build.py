"""Compiles the kernels into a shared library, once for each kind of CPU, compiler, XLA FFI version and state of the sources.

Knows the compiler and its flags; knows nothing of JAX arrays. A build goes to a temporary file and is renamed into place, so that
processes that start together never see half of one.
"""

import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax.ffi

SOURCES = pathlib.Path(__file__).parent / "src"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-w"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]
ISA_FLAGS = {
    "amxbf16": [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"],
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


def library(build_dir: os.PathLike[str] | str, progress: Callable[[str], None] = lambda line: None) -> pathlib.Path:
    """The compiled library in `build_dir` (made where absent), with the instruction sets that this CPU has, built now unless it's there
    already. A build takes about a minute on two cores, and is told to `progress` when it begins.

    Raises:
        BuildError: another kind of machine or CPU, no compiler, or the compiler's first error.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"no kernels for {platform.system()} on {platform.machine()}")
    command = compiler()
    build_dir = pathlib.Path(build_dir)
    sets = _sets(command)
    path = build_dir / f"jaxlora-native-{_key(command, sets)}.so"
    if not path.exists():
        progress(f"compiling the CPU kernels with {command[0]}, once (about a minute)")
        build_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=build_dir, prefix="build-") as folder:
            os.replace(_build(command, sets, pathlib.Path(folder)), path)
    return path


def _sets(command: list[str]) -> dict[str, list[str]]:
    """Those of `ISA_FLAGS` that both this CPU and the compiler know."""
    macros = _run([*command, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]).split()
    found = {
        isa: flags
        for isa, flags in ISA_FLAGS.items()
        if all(f"__{flag[2:].upper().replace('-', '_')}__" in macros for flag in flags if flag.startswith("-m"))
    }
    if not found:
        raise BuildError("this CPU has neither AVX-512 nor AVX2 with FMA")
    return found


def _key(command: list[str], sets: dict[str, list[str]]) -> str:
    digest = hashlib.sha256(repr((FLAGS, sets, command)).encode())
    digest.update(_run([*command, "--version"]).encode())
    headers = pathlib.Path(jax.ffi.include_dir())
    for path in [*sorted(SOURCES.iterdir()), *sorted(headers.rglob("ffi/api/*.h"))]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(command: list[str], sets: dict[str, list[str]], folder: pathlib.Path) -> pathlib.Path:
    flags = [*(f"-DJAXLORA_{isa.upper()}" for isa in sets), "-isystem", jax.ffi.include_dir()]
    work = {f"{isa}.cc": of_isa for isa, of_isa in sets.items()}  # these first, as they take the longest
    work |= {path.name: flags for path in sorted(SOURCES.glob("*.cc")) if path.stem not in ISA_FLAGS}
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        objects = list(compilers.map(lambda name: _compile(command, name, work[name], folder), work))
    built = folder / "library.so"
    _run([*command, "-shared", "-pthread", "-o", str(built), *map(str, objects)])
    return built


def _compile(command: list[str], source: str, flags: list[str], folder: pathlib.Path) -> pathlib.Path:
    target = folder / f"{source}.o"
    _run([*command, *FLAGS, *flags, "-c", str(SOURCES / source), "-o", str(target)])
    return target


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise BuildError(f"{command[0]} failed: {lines[0].strip()}")
    return done.stdout
