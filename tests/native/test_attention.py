"""Attention over a cache: equal to the twin, bitwise the same in any chunk and batch, in place, within its bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native

from .arrays import DTYPES, normal, same_bits

twin_attention = jax.jit(native.twin_attention, static_argnames=("scale", "window", "eps"))  # compiled once for all instruction sets

HEADS, KV, SIZE = 6, 2, 300


def rows(batch: int, chunk: int) -> jax.Array:
    """Where rows begin that have so many tokens each."""
    return jnp.arange(batch) * chunk


def cached(dtype: str, slots: int, d: int, seed: int = 9) -> tuple[jax.Array, jax.Array]:
    """Caches whose every position holds something, as after other sequences."""
    shape = (slots, KV, SIZE, d)
    return jnp.array(normal(seed, *shape), dtype, copy=True), jnp.array(normal(seed + 1, *shape), dtype, copy=True)


def new_tokens(batch: int, chunk: int, d: int, normed: bool = False) -> tuple[np.ndarray, tuple, tuple | None]:
    """Queries, keys and values, cosines and sines, and the scales of norms. Without norms turns are by right angles, which round nothing."""
    turns = normal(2, SIZE, d // 2)
    angles, norms = (turns, (normal(3, d), normal(4, d))) if normed else (np.round(turns) * np.float32(np.pi / 2), None)
    rotation = tuple(part if normed else np.round(part) for part in (np.cos(angles), np.sin(angles)))
    return normal(1, batch, chunk, (HEADS + 2 * KV) * d), rotation, norms


@pytest.mark.parametrize("dtype, window, normed", [("float32", 0, False), ("float32", 40, True), ("bfloat16", 1, False), ("bfloat16", 0, False), ("bfloat16", 40, False)])
@pytest.mark.parametrize(
    "chunk, d, starts, lengths",
    [
        (1, 64, [0, 17, 299, 128], [1, 1, 1, 1]),
        (1, 80, [5, 150, 0, 127], [1, 0, 1, 1]),
        (33, 64, [0, 100, 250, 120], [33, 20, 0, 1]),
        (150, 16, [0, 150, 0, 3], [150, 150, 0, 129]),
        (4, 256, [0, 60, 130, 8], [4, 3, 2, 1]),
        (3, 24, [0, 60, 130, 8], [3, 3, 0, 1]),  # a head size that is left to the twin
    ],
)
def test_attention_equals_its_twin(
    kernels: native.Kernels, dtype: str, window: int, normed: bool, chunk: int, d: int, starts: list[int], lengths: list[int]
) -> None:
    arguments = (*new_tokens(4, chunk, d, normed), *cached(dtype, 6, d), jnp.int32(starts), jnp.int32(lengths), jnp.int32([4, 0, 5, 2]), rows(4, chunk))
    options = dict(scale=d**-0.5, window=window, eps=1e-5)
    got = jax.jit(functools.partial(kernels.attention, **options))(*arguments)
    want = twin_attention(*arguments, **options)
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5, atol=2e-5)
    if normed:
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)
    assert (normed or same_bits(got[1], want[1])) and same_bits(got[2], want[2])


@pytest.mark.parametrize("dtype, window", [("float32", 0), ("bfloat16", 0), ("bfloat16", 70)])
def test_a_token_is_bitwise_the_same_in_any_chunk_and_batch(kernels: native.Kernels, dtype: str, window: int) -> None:
    total, d = 280, 64
    qkv, *rest = new_tokens(1, total, d, normed=window > 0)

    def generate(chunk: int, slot: int, others: int) -> np.ndarray:
        caches, out = cached(dtype, 4, d), []
        for start in range(0, total, chunk):
            length = min(chunk, total - start)
            part = np.pad(qkv[:, start : start + length], ((0, others), (0, chunk - length), (0, 0)), mode="edge")
            slots = [slot, *(s for s in range(4) if s != slot)][: 1 + others]
            got, *caches = kernels.attention(
                part,
                *rest,
                *caches,
                jnp.int32([start, 3, 0][: 1 + others]),
                jnp.int32([length, 1, 0][: 1 + others]),
                jnp.int32(slots),
                rows(1 + others, chunk),
                scale=0.125,
                window=window,
                eps=1e-6,
            )
            out.append(got[0, :length])
        return np.concatenate(out)

    whole = generate(total, slot=0, others=0)
    for chunk, slot, others in [(1, 1, 0), (7, 2, 2), (64, 0, 1), (100, 3, 2)]:
        assert same_bits(generate(chunk, slot, others), whole), chunk


@pytest.mark.parametrize("dtype, d", [("float32", 64), ("bfloat16", 64), ("bfloat16", 80)])
def test_rows_of_any_lengths_share_a_step_and_are_each_bitwise_as_alone(kernels: native.Kernels, dtype: str, d: int) -> None:
    starts, lengths, slots, offsets = [3, 250, 0, 131, 9], [90, 1, 0, 33, 1], [2, 0, 1, 4, 3], [0, 93, 94, 94, 127]
    (qkv, *rest), caches = new_tokens(4, 33, d, normed=True), cached(dtype, 5, d)
    where = [jnp.int32(numbers) for numbers in (starts, lengths, slots, offsets)]
    options = dict(scale=d**-0.5, window=70, eps=1e-5)
    got = kernels.attention(qkv, *rest, *caches, *where, **options)
    bounds = (2e-5 if dtype == "float32" else 2e-4, 1e-5, 1e-5)  # a key may come out on the other side of what its cache rounds
    for ours, twins, bound in zip(got, twin_attention(qkv, *rest, *caches, *where, **options), bounds):
        np.testing.assert_allclose(ours.astype(jnp.float32), twins.astype(jnp.float32), rtol=bound if dtype == "float32" else 1e-2, atol=bound)
    flat, tokens = got[0].reshape(132, HEADS, d), qkv.reshape(1, 132, -1)
    for start, length, slot, offset in zip(starts, lengths, slots, offsets):
        one = (jnp.int32([number]) for number in (start, length, slot, 0))
        alone = kernels.attention(tokens[:, offset : offset + length], *rest, *caches, *one, **options) if length else None
        assert alone is None or same_bits(alone[0][0], flat[offset : offset + length])
        assert alone is None or all(same_bits(ours[slot], own[slot]) for ours, own in zip(got[1:], alone[1:]))
    idle = [token for token in range(132) if not any(at <= token < at + length for at, length in zip(offsets, lengths))]
    assert len(idle) == 7 and not flat[np.array(idle)].any()


@pytest.mark.parametrize("offsets", [[1, 2], [0, 7], [2, 0]])
def test_offsets_that_leave_a_row_no_room_are_refused(kernels: native.Kernels, offsets: list[int]) -> None:
    arguments = (*new_tokens(1, 6, 16), *cached("float32", 2, 16), jnp.int32([0, 0]), jnp.int32([0, 0]), jnp.int32([0, 1]), jnp.int32(offsets))
    with pytest.raises(Exception, match="offsets do not ascend"):
        jax.block_until_ready(kernels.attention(*arguments, scale=1.0))


def test_idle_rows_and_tokens_write_nothing_and_come_out_as_zeros(kernels: native.Kernels) -> None:
    k_cache, v_cache = cached("float32", 3, 32)
    out, k_after, v_after = kernels.attention(
        *new_tokens(2, 5, 32), k_cache, v_cache, jnp.int32([10, 20]), jnp.int32([0, 2]), jnp.int32([0, 1]), rows(2, 5), scale=1.0
    )
    assert not out[0].any() and not out[1, 2:].any() and out[1, :2].all()
    for before, after in ((k_cache, k_after), (v_cache, v_after)):
        changed = np.argwhere((before != after).any((1, 3)))
        assert changed.tolist() == [[1, 20], [1, 21]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_beyond_a_sequence_is_not_read(kernels: native.Kernels, dtype: str) -> None:
    k_cache, v_cache = cached(dtype, 1, 32)
    rest = (jnp.int32([10]), jnp.int32([3]), jnp.int32([0]), rows(1, 5))
    step = functools.partial(kernels.attention, scale=1.0)
    clean = step(*new_tokens(1, 5, 32), k_cache, v_cache, *rest)[0]
    dirty = step(*new_tokens(1, 5, 32), k_cache.at[:, :, 10:].set(jnp.nan), v_cache.at[:, :, 10:].set(jnp.nan), *rest)[0]
    assert same_bits(clean, dirty)


@pytest.mark.parametrize(
    "starts, lengths, slots", [([300], [1], [0]), ([298], [3], [0]), ([-1], [1], [0]), ([0], [1], [3]), ([0], [4], [0])]
)
def test_rows_outside_of_the_cache_are_refused(
    kernels: native.Kernels, starts: list[int], lengths: list[int], slots: list[int]
) -> None:
    arguments = (*new_tokens(1, 3, 16), *cached("float32", 2, 16), jnp.int32(starts), jnp.int32(lengths), jnp.int32(slots), rows(1, 3))
    with pytest.raises(Exception, match="outside of the cache"):
        jax.block_until_ready(kernels.attention(*arguments, scale=1.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_donated_caches_are_updated_where_they_lie(kernels: native.Kernels, dtype: str) -> None:
    caches = cached(dtype, 2, 64)
    where = [cache.unsafe_buffer_pointer() for cache in caches]
    step = jax.jit(functools.partial(kernels.attention, scale=0.125), donate_argnums=(3, 4))
    for position in range(3):
        _, *caches = step(*new_tokens(1, 1, 64), *caches, jnp.int32([position]), jnp.int32([1]), jnp.int32([0]), rows(1, 1))
    assert [cache.unsafe_buffer_pointer() for cache in caches] == where
