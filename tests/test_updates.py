"""A part of an array replaced in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.updates import update_slice


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_part_is_replaced_bit_for_bit_and_in_place(dtype: str) -> None:
    update = functools.partial(jax.jit, donate_argnums=0)(update_slice)
    start = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
    start[0, 0, :3] = np.nan, np.inf, -0.0
    whole, part = jnp.asarray(start, dtype), jnp.asarray(start[1:2, 1:3] * 3, dtype)
    want = np.array(whole)
    want[2:3, 3:5] = np.asarray(part)
    program = update.lower(whole, part, (2, 3, 0)).compile().as_text()
    assert "input_output_alias" in program
    assert " convert(" not in program  # of the whole array, that would be
    assert np.asarray(update(whole, part, (2, 3, 0))).tobytes() == want.tobytes()
