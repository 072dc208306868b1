"""The native kernels that this machine would use. They take half a minute to build, so all tests take those of the cache that serving uses."""

import pathlib

import pytest

from jaxlora import native
from jaxlora.settings import Settings


_NONE_HERE = ("no C++ compiler", "no kernels for", "switched off", "this CPU")


def kernels_here(folder: pathlib.Path | None = None, isa: str | None = None) -> native.Kernels:
    """Skips the test, with the reason, where there are none. Ends the run where they don't compile or give wrong results: every test would try again."""
    loaded = native.load(folder or build_dir(), isa)
    if isinstance(loaded, str):
        if not loaded.startswith(_NONE_HERE):
            pytest.exit(loaded, returncode=1)
        pytest.skip(loaded)
    return loaded


def build_dir() -> pathlib.Path:
    return Settings.read().cache_dir / "native"


def share_kernels(cache: pathlib.Path) -> None:
    """Has another cache take them from there."""
    build_dir().mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "native").exists():
        (cache / "native").symlink_to(build_dir())
