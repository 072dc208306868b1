"""The kernels under test, once for each instruction set that this machine has."""

import pathlib

import pytest

from jaxlora import native

ISAS = ("avx512fp16", "avx512bf16", "avx512", "avx2")


@pytest.fixture(scope="session")
def build_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest, build_dir: pathlib.Path) -> native.Kernels:
    loaded = native.load(build_dir, request.param)
    if isinstance(loaded, str):
        pytest.skip(loaded)
    return loaded
