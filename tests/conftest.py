"""What several test files share."""

import pathlib
from collections.abc import Iterator

import jax
import pytest

from jaxlora.backend import Backend, NativeBackend, XlaBackend
from jaxlora.checkpoint import resolve
from jaxlora.checkpoint.sources import DEFAULT_MODEL
from jaxlora.compilation import keep_compiled_programs
from jaxlora.settings import Settings
from tests.kernels import kernels_here


@pytest.fixture(scope="session")
def default_model() -> pathlib.Path:
    """The folder of the default base model, in the cache that serving uses: converted once on a machine."""
    return resolve(DEFAULT_MODEL, Settings.read().cache_dir)


@pytest.fixture(scope="module", params=["xla", "native"])
def backend(request) -> Backend:
    """Every way of computing a step that this machine has."""
    if request.param == "xla":
        return XlaBackend()
    return NativeBackend(kernels_here())


@pytest.fixture(scope="session", autouse=True)
def compiled_programs_are_kept() -> None:
    """Tests make many small engines of the same shapes; each shape is compiled once."""
    keep_compiled_programs(Settings.read().cache_dir)


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Compiles without most optimisations, for tests whose programs run for milliseconds, and that have a tolerance or compare what was compiled
    alike. It spares up to two thirds of the time, and more with the XLA of jaxlib 0.7.1, which unrolls a slice of some thousand numbers for
    seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
