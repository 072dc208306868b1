"""The native kernels that this machine would use. They take half a minute to build, so all tests take those of the cache that serving uses."""

import pathlib

import pytest

from jaxlora import native
from jaxlora.settings import Settings


def kernels_here() -> native.Kernels:
    """Skips the test, with the reason, where there are none."""
    loaded = native.load(build_dir())
    if isinstance(loaded, str):
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
