"""The tiny model, made once, and one cache of compiled programs for all training tests of a run."""

import pathlib

import pytest

from tests.kernels import kernels_here, share_kernels
from tests.training import tiny
from training.machine import Machine, NativeMachine, XlaMachine


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    cache = tmp_path_factory.mktemp("cache")
    share_kernels(cache)
    return cache


@pytest.fixture(scope="module", params=["xla", "native"])
def machine(request: pytest.FixtureRequest) -> Machine:
    """Every way of training that this machine has."""
    if request.param == "xla":
        return XlaMachine()
    return NativeMachine(kernels_here())
