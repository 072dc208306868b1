"""Makes each architecture once in a test run, and each reference too: what was compiled or recorded is used again."""

import functools
import importlib.util
import pathlib
import tempfile
from collections.abc import Callable

import pytest

from jaxlora import backend
from jaxlora.settings import Settings

from . import recording
from .ours import Ours
from .recording import Record

# Where a reference comes from: Transformers and PEFT themselves where they are installed, else the files of the project, as in `make test`.
SOURCES = ("fresh",) if importlib.util.find_spec("torch") else ("stored",)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(quick_compilation: None) -> None:
    """All of these tests run their programs for milliseconds."""


@pytest.fixture(scope="session")
def ours_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ours]:
    """The library's side of an architecture, by its name."""
    return functools.cache(lambda architecture: Ours(architecture, tmp_path_factory.mktemp(architecture)))


@pytest.fixture(scope="session")
def record_of() -> Callable[[str, str], Record]:
    """The reference for an architecture, by one of `SOURCES` and its name."""

    @functools.cache
    def make(source: str, architecture: str) -> Record:
        if source == "stored":
            return Record.load(recording.FOLDER, architecture)
        from . import record

        record.settle()
        with tempfile.TemporaryDirectory() as folder:
            return record.record(architecture, pathlib.Path(folder))

    return make


@pytest.fixture(scope="session")
def serving_backend() -> backend.Backend:
    """What this machine serves with: kernels of its own on most CPUs."""
    return backend.choose(Settings.read().cache_dir / "native")[0]
