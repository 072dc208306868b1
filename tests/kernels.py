"""The native kernels that this machine would use."""

import pytest

from jaxlora import native
from jaxlora.settings import Settings


def kernels_here() -> native.Kernels:
    """Those of the cache that serving uses. Skips the test, with the reason, where there are none."""
    loaded = native.load(Settings.read().cache_dir / "native")
    if isinstance(loaded, str):
        pytest.skip(loaded)
    return loaded
