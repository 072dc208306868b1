"""From sources to kernels that may be called: build, load, register, check."""

import ctypes
import os
import pathlib
import threading
from collections.abc import Callable

import jax

from jaxlora.native import build, selfcheck
from jaxlora.native.kernels import Kernels

_TARGETS = (
    "linear", "attention", "causal", "causal_gradient", "adapted", "adapted_gradient", "place", "summarize", "draw", "embed", "rms_norm",
)  # fmt: skip
_lock = threading.Lock()
_loaded: list[tuple[pathlib.Path, ctypes.CDLL]] = []  # at most one: the targets of jax.ffi belong to the process


def load(
    build_dir: os.PathLike[str] | str, isa: str | None = None, progress: Callable[[str], None] = lambda line: None
) -> Kernels | str:
    """Builds the library into `build_dir` unless it's there, loads it, registers it with JAX and checks a fresh build once.

    A process has one library and one instruction set at a time; a later call may change the set.

    Arguments:
        build_dir: folder for the compiled library; it may be shared by processes.
        isa: `amxbf16`, `avx512fp16`, `avx512bf16`, `avx512` or `avx2`; by default `JAXLORA_NATIVE_ISA` (which may be `none`), or else the best there is.
        progress: told, in a line, before what takes long.

    Returns:
        The kernels, or one line that says why there are none. The caller then stays with plain JAX.
    """
    isa = isa or os.environ.get("JAXLORA_NATIVE_ISA", "")
    if isa == "none":
        return "switched off by JAXLORA_NATIVE_ISA"
    with _lock:
        if not _loaded:
            try:
                path = build.library(build_dir, progress)
                library = ctypes.CDLL(str(path))
            except (build.BuildError, OSError) as error:
                return str(error)
            library.jaxlora_select.restype = ctypes.c_char_p
            for name in _TARGETS:
                handler = jax.ffi.pycapsule(getattr(library, f"jaxlora_{name}"))
                jax.ffi.register_ffi_target(f"jaxlora_{name}", handler, platform="cpu")
            _loaded.append((path, library))
        path, library = _loaded[0]
        chosen = library.jaxlora_select(isa.encode()).decode()
        if not chosen:
            return f"this CPU or compiler lacks {isa}"
        kernels = Kernels(path, chosen, library.jaxlora_threads(), library.jaxlora_panel())
        checked = path.with_suffix(f".{chosen}.checked")
        if not checked.exists():
            if wrong := selfcheck.wrong_results(kernels):
                return f"the compiled library for {chosen} gives wrong results: {', '.join(wrong)}"
            checked.touch()
        return kernels
