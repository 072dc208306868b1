"""Random keys of JAX: each module's own, and which leaves of a tree are keys."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def number_of(path: str) -> np.uint32:
    """The number of a module's path, the same in every process, as `hash` is not."""
    return np.uint32(zlib.crc32(path.encode()))


def of_module(key: Array, path: str) -> Array:
    """A key that differs between modules."""
    return jax.random.fold_in(key, number_of(path))


def is_key(leaf: Any) -> bool:
    """Whether an array of a tree holds random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
