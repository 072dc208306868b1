"""Windows of fixed shapes: every example once an epoch, in an order that is a function of (seed, epoch)."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from training.batches import ALIGNMENT, KEPT, Batches, choose_buckets, pack
from training.method import Example


def examples(lengths: list[int]) -> list[Example]:
    return [
        Example((line,), {"tokens": np.full(length, line + 1, np.int32), "mask": np.ones(length, np.uint8)})
        for line, length in enumerate(lengths)
    ]


LENGTHS = [int(length) for length in np.random.Generator(np.random.PCG64(1)).integers(2, 90, 53)]


def batches(seed: int | None = 0, **more: object) -> Batches:
    return Batches(examples(LENGTHS), micro_batches=2, micro_batch_size=3, buckets=choose_buckets(LENGTHS, 3), seed=seed, **more)


def test_an_epoch_has_every_example_once_and_at_most_one_window_that_is_not_full() -> None:
    source = batches()
    assert source.steps_per_epoch == -(-len(LENGTHS) // 6)
    for epoch in range(2):
        steps = range(epoch * 9, epoch * 9 + 9)
        lines = [source.lines(step) for step in steps]
        assert sorted(itertools.chain(*lines)) == list(range(53))
        assert sorted(map(len, lines)) == [5] + [6] * 8


def test_windows_hold_the_examples_of_their_lines_and_zeros() -> None:
    source = batches()
    for step in range(9):
        window, lines = source.window(step), source.lines(step)
        rows = window["tokens"].reshape(6, -1)
        assert window["tokens"].shape == (2, 3, rows.shape[1]) and rows.shape[1] in source.buckets
        found = sorted((int(row[0]) - 1, int((row != 0).sum())) for row in rows if row.any())
        assert found == [(line, LENGTHS[line]) for line in lines]
        assert ((window["mask"] == 1) == (window["tokens"] != 0)).all()


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    one, same, other = batches(3), batches(3), batches(4)
    for step in (17, 2, 8):  # in any order of asking
        np.testing.assert_array_equal(one.window(step)["tokens"], same.window(step)["tokens"])
    assert any(one.lines(step) != other.lines(step) for step in range(9))
    assert any(one.lines(step) != one.lines(step + 9) for step in range(9))


def test_without_a_seed_the_order_is_that_of_the_file() -> None:
    source = Batches(examples([5] * 7), micro_batches=1, micro_batch_size=3, buckets=(16,), seed=None)
    assert [source.lines(step) for step in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(list(source.windows())) == 3


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_buckets_pad_least(count: int) -> None:
    lengths = [3, 15, 16, 17, 40, 41, 42, 47, 90, 90, 90, 200]
    sizes = sorted({-(-length // ALIGNMENT) * ALIGNMENT for length in lengths})

    def cost(buckets: tuple[int, ...]) -> int:
        return sum(min(bucket for bucket in buckets if bucket >= length) for length in lengths)

    best = min(cost((*chosen, sizes[-1])) for chosen in itertools.combinations(sizes[:-1], count - 1))
    chosen = choose_buckets(lengths, count)
    assert cost(chosen) == best and len(chosen) == count


def test_there_are_no_more_buckets_than_sizes() -> None:
    assert choose_buckets([5, 6, 20], 8) == (16, 32)


def test_packing_keeps_every_example_whole_and_apart() -> None:
    rows = pack(examples(LENGTHS), 96)
    assert len(rows) < len(LENGTHS) * 0.7
    found: Counter[tuple[int, int]] = Counter()
    for row in rows:
        assert row.length <= 96
        for segment in range(1, row.arrays["segments"].max() + 1):
            tokens = row.arrays["tokens"][row.arrays["segments"] == segment]
            assert len(set(tokens.tolist())) == 1
            found[int(tokens[0]) - 1, len(tokens)] += 1
    assert found == Counter(enumerate(LENGTHS))


def test_packing_many_examples_takes_no_time() -> None:
    began = time.monotonic()
    rows = pack(examples([5 + at % 90 for at in range(20_000)]), 96)
    assert time.monotonic() - began < 10 and sum(len(row.lines) for row in rows) == 20_000


def test_packed_windows_have_one_shape() -> None:
    source = batches(pack_length=96)
    windows = [source.window(step) for step in range(int(source.steps_per_epoch))]
    assert {window["segments"].shape for window in windows} == {(2, 3, 96)}
    assert sorted(itertools.chain(*map(source.lines, range(len(windows))))) == list(range(53))


def test_single_values_stay_single() -> None:
    rows = [Example((line,), {"tokens": np.ones(4, np.int32), "label": np.uint8(1)}) for line in range(2)]
    window = Batches(rows, micro_batches=1, micro_batch_size=3, buckets=(16,), seed=None).window(0)
    assert window["label"].tolist() == [[1, 1, 0]] and window["tokens"].shape == (1, 3, 16)


@pytest.mark.parametrize("more", [{}, {"pack_length": 96}])
def test_a_step_is_the_same_wherever_one_begins_and_plans_of_other_epochs_are_let_go(more: dict[str, int]) -> None:
    source = batches(**more)
    first = [source.lines(step) for step in range(40)]
    assert len(source._plans) == KEPT
    later = batches(**more)
    assert later.lines(39) == first[39] and [later.lines(step) for step in range(40)] == first
