"""What several test files share."""

import pathlib

import pytest

from jaxlora.checkpoint import resolve
from jaxlora.checkpoint.sources import DEFAULT_MODEL
from jaxlora.settings import Settings


@pytest.fixture(scope="session")
def default_model() -> pathlib.Path:
    """The folder of the default base model, in the cache that serving uses: converted once on a machine."""
    return resolve(DEFAULT_MODEL, Settings.read().cache_dir)
