"""From sources to kernels that may be called: build, load, register, check."""

import contextlib
import ctypes
import os
import pathlib
import threading
from collections.abc import Callable

import jax

from jaxlora.native import build, selfcheck
from jaxlora.native.kernels import Kernels

_TARGETS = (
    "linear", "attention", "causal", "causal_gradient", "adapted", "adapted_gradient", "log_probs", "place", "summarize", "draw", "embed",
    "rms_norm", "rms_norm_gradient", "swiglu", "swiglu_gradient",
)  # fmt: skip
_lock = threading.Lock()
_core: list[ctypes.CDLL] = []  # at most one: the targets of jax.ffi belong to the process
_sets: dict[str, tuple[pathlib.Path, ctypes.CDLL]] = {}


def load(
    build_dir: os.PathLike[str] | str, isa: str | None = None, progress: Callable[[str], None] = lambda line: None
) -> Kernels | str:
    """Builds what is wanted into `build_dir` unless it's there, loads it, registers it with JAX and checks a fresh build once.

    A process has one instruction set at a time; a later call may change it.

    Arguments:
        build_dir: folder for compiled libraries; it may be shared by processes.
        isa: `amxbf16`, `avx512fp16`, `avx512bf16`, `avx512` or `avx2`; by default `JAXLORA_NATIVE_ISA` (which may be `none`), or else the best there is.
        progress: told, in a line, before what takes long.

    Returns:
        The kernels, or one line that says why there are none. The caller then stays with plain JAX.
    """
    isa = isa or os.environ.get("JAXLORA_NATIVE_ISA", "")
    if isa == "none":
        return "switched off by JAXLORA_NATIVE_ISA"
    with _lock:
        try:
            chosen = next((each for each in ([isa] if isa else build.preferred()) if _use(each, build_dir, progress)), None)
        except (build.BuildError, OSError) as error:
            return str(error)
        if chosen is None:
            return f"this system lets nobody use {isa or 'any of the instruction sets'}"
        path, _ = _sets[chosen]
        kernels = Kernels(path, chosen, _core[0].jaxlora_threads(), _core[0].jaxlora_panel())
        checked = path.with_suffix(".checked")
        if not checked.exists():
            if wrong := selfcheck.wrong_results(kernels):
                return f"the compiled library for {chosen} gives wrong results: {', '.join(wrong)}"
            with contextlib.suppress(OSError):  # then the next start checks again
                checked.touch()
        return kernels


def _use(isa: str, build_dir: os.PathLike[str] | str, progress: Callable[[str], None]) -> bool:
    """Whether the system lets this process use that set, which is in use then."""
    if isa not in _sets:
        paths = build.libraries(build_dir, [isa], progress)
        library = ctypes.CDLL(str(paths[isa]))
        library.jaxlora_kernels.restype = ctypes.c_void_p
        if not _core:
            _core.append(_register(ctypes.CDLL(str(paths[build.CORE]))))
        _sets[isa] = paths[isa], library
    return _core[0].jaxlora_use(_sets[isa][1].jaxlora_kernels())


def _register(core: ctypes.CDLL) -> ctypes.CDLL:
    core.jaxlora_use.restype, core.jaxlora_use.argtypes = ctypes.c_bool, [ctypes.c_void_p]
    for name in _TARGETS:
        handler = jax.ffi.pycapsule(getattr(core, f"jaxlora_{name}"))
        jax.ffi.register_ffi_target(f"jaxlora_{name}", handler, platform="cpu")
    return core
