"""Python's garbage collector in a process that holds a model."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def kept_from_start() -> Iterator[None]:
    """For what makes a model: without collections meanwhile, and what is there afterwards takes part in none. Tracing programs makes hundreds
    of thousands of objects that stay, and a collection that looks at all of them holds every thread for a fifth of a second."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
