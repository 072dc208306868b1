"""Which `tritonserver` to run, and what it needs beside it.

Knows two kinds. A `tritonserver` on PATH (an NGC container) comes with its own backends and is used as it is. Otherwise the binary in
the PyPI wheel `nvidia-pytriton` is used; its Python backend gets a folder of its own in the cache, where the stub that was built for the
running Python lies beside `libtriton_python.so`, as the backend wants it.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping

from jaxlora.errors import SetupError

WHEEL = "nvidia-pytriton"


@dataclasses.dataclass(frozen=True)
class Installation:
    """A server that can be run.

    Attributes:
        binary: the `tritonserver` to run.
        backend_directory: folder for `--backend-directory`, or None where the binary knows its own.
        library_path: folders for the server's `LD_LIBRARY_PATH`, before those that are there already.
        origin: for people: where the binary is from.
    """

    binary: pathlib.Path
    backend_directory: pathlib.Path | None
    library_path: tuple[pathlib.Path, ...]
    origin: str


def find(cache_dir: pathlib.Path, environ: Mapping[str, str] = os.environ) -> Installation:
    """The server to run: the first `tritonserver` on PATH, else the one of the wheel, made ready under `cache_dir`.

    Raises:
        SetupError: there is none, or the running Python can't be used with it.
    """
    on_path = shutil.which("tritonserver", path=environ.get("PATH"))
    if on_path:
        return Installation(pathlib.Path(on_path), None, (), on_path)
    return _from_wheel(cache_dir)


def _from_wheel(cache_dir: pathlib.Path) -> Installation:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(f"no tritonserver on PATH, and the package {WHEEL} is not installed: run `make venv`")
    package = pathlib.Path(spec.submodule_search_locations[0])
    root = package / "tritonserver"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.is_file():
        built = sorted(path.name for path in (root / "python_backend_stubs").iterdir())
        raise SetupError(f"{WHEEL} has no Python backend for Python {python}; it has {', '.join(built)}")
    version = importlib.metadata.version(WHEEL)
    backends = _prepare_backend(root / "backends" / "python", stub, cache_dir / f"triton-{version}-python{python}")
    return Installation(
        binary=root / "bin" / "tritonserver",
        backend_directory=backends,
        library_path=(package.parent / "nvidia_pytriton.libs", _shared_libpython().parent),
        origin=f"{WHEEL} {version}",
    )


def _shared_libpython() -> pathlib.Path:
    """The shared library of the running interpreter, which the stub is linked against."""
    name, folder = sysconfig.get_config_var("INSTSONAME"), sysconfig.get_config_var("LIBDIR")
    path = pathlib.Path(folder or "/", name or "libpython.so")
    if not sysconfig.get_config_var("Py_ENABLE_SHARED") or not path.is_file():
        raise SetupError(
            f"{sys.executable} has no shared library ({name} in {folder}), which Triton's Python backend needs: "
            "install it (Debian: the package libpython3.X), or make the venv with another interpreter: `make clean venv PYTHON=...`"
        )
    return path


def _prepare_backend(backend: pathlib.Path, stub: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Copies the backend and its stub to `target`/python by one rename, unless they are there, and returns `target`."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    incoming = pathlib.Path(tempfile.mkdtemp(prefix=f"{target.name}.incoming-", dir=target.parent))
    try:
        (incoming / "python").mkdir()
        for source in (backend / "libtriton_python.so", backend / "triton_python_backend_utils.py", stub):
            shutil.copy(source, incoming / "python")
        incoming.chmod(0o755)
        try:
            incoming.rename(target)
        except OSError:
            if not target.is_dir():  # else another start was quicker, with the same content
                raise
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return target
