"""The kernels under test, once for each instruction set that this machine has."""

import contextlib
import pathlib
import shutil

import pytest

import tests.kernels
from jaxlora import native
from jaxlora.native import build

from . import emulation

emulation.where_asked()

ISAS = ("amxbf16", "avx512fp16", "avx512bf16", "avx512", "avx2")


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(quick_compilation: None) -> None:
    """XLA compiles what the kernels are compared with; they themselves are compiled as ever."""


@pytest.fixture(scope="session")
def build_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """With the libraries of all sets that this machine has: at once, since each compiles on one core."""
    folder = tmp_path_factory.mktemp("native")
    with contextlib.suppress(build.BuildError):  # then the tests say why
        for path in build.libraries(tests.kernels.build_dir(), build.known()).values():
            shutil.copy(path, folder)
    return folder


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest, build_dir: pathlib.Path) -> native.Kernels:
    return tests.kernels.kernels_here(build_dir, request.param)
