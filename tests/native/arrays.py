"""Arrays for the kernel tests."""

import jax
import numpy as np

DTYPES = ("float32", "bfloat16")
ROUNDING = ("amxbf16", "avx512bf16")  # these round to bfloat16 what is multiplied with weights of it


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def same_bits(a: jax.Array, b: jax.Array) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()
