"""Native kernels against their twins, for each instruction set of this machine."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import native
from jaxlora.native import build

ISAS = ("avx512bf16", "avx512", "avx2")
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="session")
def build_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest, build_dir: pathlib.Path) -> native.Kernels:
    loaded = native.load(build_dir, request.param)
    if isinstance(loaded, str):
        pytest.skip(loaded)
    return loaded


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def same_bits(a: jax.Array, b: jax.Array) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


# Compiled once for all instruction sets.
twin_attention = jax.jit(native.twin_attention, static_argnames=("scale", "window"))
twin_lora = jax.jit(native.twin_lora, static_argnames=("modules", "max_rank"))

# linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, k, n", [(1, 576, 960), (16, 64, 32), (3, 17, 33), (2, 1, 1), (15, 575, 100), (130, 48, 70), (0, 8, 8)])
def test_linear_equals_its_twin(kernels: native.Kernels, dtype: str, m: int, k: int, n: int) -> None:
    x, w = normal(0, m, k), jnp.asarray(normal(1, k, n), dtype)
    if dtype == "bfloat16" and kernels.isa == "avx512bf16":
        x = x.astype(jnp.bfloat16).astype(np.float32)
    got = jax.jit(kernels.linear)(x, native.pack_linear(w))
    np.testing.assert_allclose(got, native.twin_linear(x, w), rtol=1e-5, atol=1e-5 * k**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_linear_is_bitwise_the_same_beside_any_number_of_rows(kernels: native.Kernels, dtype: str) -> None:
    x, w = normal(0, 300, 75), native.pack_linear(jnp.asarray(normal(1, 75, 100), dtype))
    alone = jnp.concatenate([kernels.linear(x[i : i + 1], w) for i in range(40)])
    for m in [*range(2, 18), 28, 29, 39, 129, 300]:
        assert same_bits(kernels.linear(x[:m], w)[:40], alone[:m]), m
    assert same_bits(kernels.linear(x[7:50], w)[:20], alone[7:27])


def test_linear_keeps_leading_dimensions(kernels: native.Kernels) -> None:
    x, w = normal(0, 2, 3, 8), native.pack_linear(normal(1, 8, 5))
    assert same_bits(kernels.linear(x, w), kernels.linear(x.reshape(6, 8), w).reshape(2, 3, 5))


def test_x_is_rounded_to_nearest_even_where_it_is_rounded(kernels: native.Kernels) -> None:
    x = np.concatenate([normal(0, 4096), np.float32([0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3e38, 1e-30])])
    one = native.pack_linear(jnp.ones((1, 1), jnp.bfloat16))
    want = x.astype(jnp.bfloat16).astype(np.float32) if kernels.isa == "avx512bf16" else x
    np.testing.assert_array_equal(kernels.linear(x[:, None], one)[:, 0], want)


def test_weights_of_another_type_or_shape_are_refused(kernels: native.Kernels) -> None:
    with pytest.raises(TypeError, match="float16"):
        native.pack_linear(np.ones((2, 2), np.float16))
    packed = native.pack_linear(np.ones((4, 4), np.float32))
    with pytest.raises(Exception, match="packed for another shape"):
        jax.block_until_ready(kernels.linear(np.ones((1, 6), np.float32), native.Packed(packed.data, 6, 4)))


# attention

HEADS, KV, SIZE = 6, 2, 300


def cached(dtype: str, slots: int, d: int, seed: int = 9) -> tuple[jax.Array, jax.Array]:
    """Caches whose every position holds something, as after other sequences."""
    shape = (slots, KV, SIZE, d)
    return jnp.array(normal(seed, *shape), dtype, copy=True), jnp.array(normal(seed + 1, *shape), dtype, copy=True)


def new_tokens(batch: int, chunk: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return normal(1, batch, chunk, HEADS, d), normal(2, batch, chunk, KV, d), normal(3, batch, chunk, KV, d)


@pytest.mark.parametrize("dtype, window", [("float32", 0), ("float32", 40), ("bfloat16", 1)])
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
    kernels: native.Kernels, dtype: str, window: int, chunk: int, d: int, starts: list[int], lengths: list[int]
) -> None:
    arguments = (*new_tokens(4, chunk, d), *cached(dtype, 6, d), jnp.int32(starts), jnp.int32(lengths), jnp.int32([4, 0, 5, 2]))
    options = dict(scale=d**-0.5, window=window)
    got = jax.jit(functools.partial(kernels.attention, **options))(*arguments)
    want = twin_attention(*arguments, **options)
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5, atol=2e-5)
    assert same_bits(got[1], want[1]) and same_bits(got[2], want[2])


@pytest.mark.parametrize("dtype, window", [("float32", 0), ("bfloat16", 70)])
def test_a_token_is_bitwise_the_same_in_any_chunk_and_batch(kernels: native.Kernels, dtype: str, window: int) -> None:
    total, d = 280, 64
    q, k, v = new_tokens(1, total, d)

    def generate(chunk: int, slot: int, others: int) -> np.ndarray:
        caches, out = cached(dtype, 4, d), []
        for start in range(0, total, chunk):
            length = min(chunk, total - start)
            q_part, k_part, v_part = (
                np.pad(a[:, start : start + length], ((0, others), (0, chunk - length), (0, 0), (0, 0)), mode="edge") for a in (q, k, v)
            )
            slots = [slot, *(s for s in range(4) if s != slot)][: 1 + others]
            got, *caches = kernels.attention(
                q_part, k_part, v_part, *caches, jnp.int32([start, 3, 0][: 1 + others]), jnp.int32([length, 1, 0][: 1 + others]),
                jnp.int32(slots), scale=0.125, window=window,
            )
            out.append(got[0, :length])
        return np.concatenate(out)

    whole = generate(total, slot=0, others=0)
    for chunk, slot, others in [(1, 1, 0), (7, 2, 2), (64, 0, 1), (100, 3, 2)]:
        assert same_bits(generate(chunk, slot, others), whole), chunk


def test_idle_rows_and_tokens_write_nothing_and_come_out_as_zeros(kernels: native.Kernels) -> None:
    k_cache, v_cache = cached("float32", 3, 32)
    out, k_after, v_after = kernels.attention(
        *new_tokens(2, 5, 32), k_cache, v_cache, jnp.int32([10, 20]), jnp.int32([0, 2]), jnp.int32([0, 1]), scale=1.0
    )
    assert not out[0].any() and not out[1, 2:].any() and out[1, :2].all()
    for before, after in ((k_cache, k_after), (v_cache, v_after)):
        changed = np.argwhere((before != after).any((1, 3)))
        assert changed.tolist() == [[1, 20], [1, 21]]


def test_what_lies_beyond_a_sequence_is_not_read(kernels: native.Kernels) -> None:
    k_cache, v_cache = cached("float32", 1, 32)
    rest = (jnp.int32([10]), jnp.int32([3]), jnp.int32([0]))
    step = functools.partial(kernels.attention, scale=1.0)
    clean = step(*new_tokens(1, 5, 32), k_cache, v_cache, *rest)[0]
    dirty = step(*new_tokens(1, 5, 32), k_cache.at[:, :, 10:].set(jnp.nan), v_cache.at[:, :, 10:].set(jnp.nan), *rest)[0]
    assert same_bits(clean, dirty)


@pytest.mark.parametrize("starts, lengths, slots", [([300], [1], [0]), ([298], [3], [0]), ([-1], [1], [0]), ([0], [1], [3]), ([0], [4], [0])])
def test_rows_outside_of_the_cache_are_refused(kernels: native.Kernels, starts: list[int], lengths: list[int], slots: list[int]) -> None:
    arguments = (*new_tokens(1, 3, 16), *cached("float32", 2, 16), jnp.int32(starts), jnp.int32(lengths), jnp.int32(slots))
    with pytest.raises(Exception, match="outside of the cache"):
        jax.block_until_ready(kernels.attention(*arguments, scale=1.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_donated_caches_are_updated_where_they_lie(kernels: native.Kernels, dtype: str) -> None:
    caches = cached(dtype, 2, 64)
    where = [cache.unsafe_buffer_pointer() for cache in caches]
    step = jax.jit(functools.partial(kernels.attention, scale=0.125), donate_argnums=(3, 4))
    for position in range(3):
        _, *caches = step(*new_tokens(1, 1, 64), *caches, jnp.int32([position]), jnp.int32([1]), jnp.int32([0]))
    assert [cache.unsafe_buffer_pointer() for cache in caches] == where


# lora

SLOTS, MAX_RANK = 5, 16
RANKS = jnp.int32([8, 0, 16, 3, 13])


def bank_for(k: int, widths: list[int], dtype: str) -> tuple[jax.Array, tuple[native.LoraModule, ...]]:
    """A bank whose unused ranks hold NaN, and modules side by side in y with a gap before the first."""
    modules, parts, column, offset = [], [], 2, 0
    used = np.arange(MAX_RANK) < np.asarray(RANKS)[:, None]
    for width in widths:
        modules.append(native.LoraModule(offset, offset + MAX_RANK * k, column, width))
        for size in (k, width):
            values = normal(offset + size, SLOTS, MAX_RANK, size)
            parts.append(np.where(used[:, :, None], values, np.nan).reshape(SLOTS, -1))
        column, offset = column + width, offset + MAX_RANK * (k + width)
    return jnp.asarray(np.concatenate(parts, axis=1), dtype), tuple(modules)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "k, widths, rows",
    [(576, [576, 192, 192], [0]), (37, [11, 300], [2, -1, 2, 0, 1, 4, 3]), (8, [1], [-1, -1]), (64, [64], [4] * 20 + [2] * 3)],
)
def test_lora_equals_its_twin(kernels: native.Kernels, dtype: str, k: int, widths: list[int], rows: list[int]) -> None:
    bank, modules = bank_for(k, widths, dtype)
    y, x = normal(0, len(rows), sum(widths) + 3), normal(1, len(rows), k)
    options = dict(modules=modules, max_rank=MAX_RANK)
    got = jax.jit(functools.partial(kernels.lora, **options))(y, x, bank, jnp.int32(rows), RANKS)
    want = twin_lora(y, x, jnp.nan_to_num(bank), jnp.int32(rows), RANKS, **options)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * k**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_lora_is_bitwise_the_same_beside_any_others(kernels: native.Kernels, dtype: str) -> None:
    bank, modules = bank_for(100, [70, 33], dtype)
    y, x = normal(0, 64, 106), normal(1, 64, 100)
    slots = np.random.default_rng(5).integers(-1, SLOTS, 64).astype(np.int32)
    step = jax.jit(functools.partial(kernels.lora, modules=modules, max_rank=MAX_RANK))
    alone = np.concatenate([step(y[i : i + 1], x[i : i + 1], bank, slots[i : i + 1], RANKS) for i in range(64)])
    for order in (np.arange(64), np.argsort(slots), np.random.default_rng(6).permutation(64)[:23]):
        assert same_bits(step(y[order], x[order], bank, slots[order], RANKS), alone[order])
    assert same_bits(alone[slots < 0], y[slots < 0])


def test_y_is_updated_where_it_lies(kernels: native.Kernels) -> None:
    bank, modules = bank_for(16, [16], "float32")
    y = jnp.array(normal(0, 2, 32), copy=True)
    where = y.unsafe_buffer_pointer()
    step = jax.jit(functools.partial(kernels.lora, modules=modules, max_rank=MAX_RANK), donate_argnums=0)
    assert step(y, normal(1, 2, 16), bank, jnp.int32([0, 2]), RANKS).unsafe_buffer_pointer() == where


def test_slots_and_modules_outside_of_the_bank_are_refused(kernels: native.Kernels) -> None:
    bank, modules = bank_for(16, [16], "float32")
    y, x = normal(0, 1, 32), normal(1, 1, 16)
    for slot, module, ranks, message in [
        (SLOTS, modules[0], RANKS, "names slot 5 of 5"),
        (0, modules[0]._replace(b=bank.shape[1]), RANKS, "outside of the bank"),
        (0, modules[0]._replace(column=20), RANKS, "outside of the bank or of y"),
        (0, modules[0], RANKS + 16, "rank above"),
    ]:
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(kernels.lora(y, x, bank, jnp.int32([slot]), ranks, modules=(module,), max_rank=MAX_RANK))


# argmax and logsumexp


@pytest.mark.parametrize("m, n", [(1, 1), (3, 7), (2, 16), (5, 1000), (17, 49152)])
def test_argmax_and_logsumexp_equal_their_twins(kernels: native.Kernels, m: int, n: int) -> None:
    logits = normal(0, m, n) * 20
    for got, want in zip(kernels.argmax_logsumexp(logits), native.twin_argmax_logsumexp(logits)):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_argmax_takes_the_first_of_equals(kernels: native.Kernels) -> None:
    logits = np.full((3, 40), -2, np.float32)
    logits[1, [5, 20, 39]] = 7
    logits[2, 38:] = 7
    assert kernels.argmax_logsumexp(logits)[0].tolist() == [0, 5, 38]


# huge pages


@pytest.mark.parametrize("size", [0, 10, 3 << 20])
def test_huge_pages_change_neither_values_nor_addresses(size: int) -> None:
    array = jnp.arange(size)
    where = array.unsafe_buffer_pointer()
    assert 0 <= native.use_huge_pages([array]) <= array.nbytes
    assert array.unsafe_buffer_pointer() == where and (array == np.arange(size)).all()


# build and load


def test_a_second_build_takes_the_library_that_is_there(kernels: native.Kernels, build_dir: pathlib.Path) -> None:
    assert build.library(build_dir) == kernels.path
    assert [path.name for path in build_dir.iterdir() if path.suffix != ".checked"] == [kernels.path.name]


def test_a_library_that_computes_something_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, kernels: native.Kernels, build_dir: pathlib.Path
) -> None:
    for path in build_dir.glob("*.checked"):
        path.unlink()
    monkeypatch.setattr(native.Kernels, "linear", staticmethod(lambda x, w: jnp.zeros((len(x), w.n))))
    assert native.load(build_dir, kernels.isa) == f"the compiled library for {kernels.isa} gives wrong results: " + (
        "linear in float32, linear in bfloat16"
    )
    monkeypatch.undo()
    assert native.load(build_dir, kernels.isa) == kernels


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"JAXLORA_NATIVE_ISA": "none"}, "switched off"),
        ({"CXX": "/no/such/compiler"}, "does not run"),
        ({"CXX": "false"}, "failed"),
        ({"PATH": "/nowhere"}, "no C\\+\\+ compiler"),
    ],
)
def test_without_a_compiler_there_is_a_reason_instead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, environment: dict[str, str], reason: str
) -> None:
    monkeypatch.setattr(native.loading, "_loaded", [])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    got = native.load(tmp_path)
    assert isinstance(got, str) and "\n" not in got
    assert re.search(reason, got)


def test_threads_do_not_change_a_bit(kernels: native.Kernels, build_dir: pathlib.Path) -> None:
    program = f"""
import sys, numpy as np, jax.numpy as jnp
from jaxlora import native
kernels = native.load({str(build_dir)!r}, {kernels.isa!r})
x, w = (np.random.default_rng(i).standard_normal(s, np.float32) for i, s in enumerate([(33, 100), (100, 2000)]))
print(kernels.threads, hash(np.asarray(kernels.linear(x, native.pack_linear(w))).tobytes()))
"""
    def run(threads: int) -> list[str]:
        environment = os.environ | {"JAXLORA_NATIVE_THREADS": str(threads), "PYTHONHASHSEED": "0"}
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout.split()

    one, three = run(1), run(3)
    assert (one[0], three[0]) == ("1", "3") and one[1] == three[1]
