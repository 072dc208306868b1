"""Examples in, windows of fixed shapes out: length buckets, packing, and an order that is a function of (seed, epoch).

Every optimizer step takes one window: `[M, B, T]` of one bucket's T, so that there are as many compiled programs as buckets. What
is left of a bucket at the end of an epoch moves up to the next one, so that at most one window of an epoch is not full.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from training.method import Example, Window

ALIGNMENT = 16  # lengths are rounded up to a multiple of this, in tokens
KEPT = 2  # plans of epochs: packed, each holds all tokens of the data
OPEN = 64  # rows that packing looks at: the time that it takes grows with the examples, not with their square


def choose_buckets(lengths: Sequence[int], count: int) -> tuple[int, ...]:
    """At most `count` lengths, ascending, multiples of `ALIGNMENT`, that pad sequences of these `lengths` least."""
    tally = collections.Counter(-(-length // ALIGNMENT) * ALIGNMENT for length in lengths)
    sizes = sorted(tally)
    # best[k][j]: the least number of tokens of the first j sizes in k buckets, and where the last bucket starts.
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for _ in range(min(count, len(sizes))):
        row = {}
        for end in range(len(best), len(sizes) + 1):
            row[end] = min(
                (cost + sizes[end - 1] * sum(tally[size] for size in sizes[start:end]), start)
                for start, (cost, _) in best[-1].items()
                if start < end
            )
        best.append(row)
    chosen, end = [], len(sizes)
    for row in reversed(best[1:]):
        if end:
            chosen.append(sizes[end - 1])
            end = row[end][1]
    return tuple(sorted(chosen))


def pack(examples: Sequence[Example], length: int) -> list[Example]:
    """Puts examples together into rows of at most `length` tokens, each into the first of the last `OPEN` with room.

    Their arrays are joined; `segments` numbers the examples of a row from 1, so that attention and positions keep them apart.
    """
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        open_rows = range(max(0, len(rows) - OPEN), len(rows))
        at = next((index for index in open_rows if room[index] >= example.length), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(length)
        rows[at].append(example)
        room[at] -= example.length
    return [_joined(row) for row in rows]


def _joined(row: Sequence[Example]) -> Example:
    arrays = {name: np.concatenate([example.arrays[name] for example in row]) for name in row[0].arrays}
    arrays["segments"] = np.concatenate([np.full(example.length, number, np.int32) for number, example in enumerate(row, 1)])
    return Example(tuple(line for example in row for line in example.lines), arrays)


def collate(examples: Sequence[Example], rows: int, length: int, like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays `[rows, length]` for sequences and `[rows]` for single values; what no example fills is zero.

    Arguments:
        like: the arrays of any example, for names and types.
    """
    arrays = {name: np.zeros((rows, length) if array.ndim else rows, array.dtype) for name, array in like.items()}
    for row, example in enumerate(examples):
        for name, array in example.arrays.items():
            if array.ndim:
                arrays[name][row, : len(array)] = array
            else:
                arrays[name][row] = array
    return arrays


class Batches:
    """A `training.method.Source`, and a `HeldOut` too: the same data in windows of `micro_batches` x `micro_batch_size` examples.

    Arguments:
        seed: of the order. None: the order of the file, for evaluation.
        buckets: lengths that cover every example; see `choose_buckets`.
        pack_length: pack examples into rows of this length, see `pack`; there is one bucket then.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        micro_batches: int,
        micro_batch_size: int,
        buckets: Sequence[int],
        seed: int | None = 0,
        pack_length: int | None = None,
    ):
        self._examples, self._seed, self._pack_length = examples, seed, pack_length
        self._micro_batches, self._micro_batch_size = micro_batches, micro_batch_size
        self.buckets = (pack_length,) if pack_length else tuple(buckets)
        self._plans: dict[int, list[tuple[int, list[Example]]]] = {}  # of the last epochs that were asked for
        self._counts: list[int] = []  # windows of each epoch, from the first
        self.steps_per_epoch = float(len(self._plan(0)))

    def window(self, step: int, adapter: object = None) -> Window:
        return self._collated(*self._of_step(step))

    def lines(self, step: int) -> list[int]:
        return sorted(line for example in self._of_step(step)[1] for line in example.lines)

    def start_metrics(self, step: int) -> Mapping[str, float]:
        return {"tokens": sum(example.tokens for example in self._of_step(step)[1])}

    def windows(self) -> Iterator[Window]:
        for length, examples in self._plan(0):
            yield self._collated(length, examples)

    def _collated(self, length: int, examples: list[Example]) -> Window:
        shape = (self._micro_batches, self._micro_batch_size)
        arrays = collate(examples, shape[0] * shape[1], length, examples[0].arrays)
        return {name: array.reshape(*shape, *array.shape[1:]) for name, array in arrays.items()}

    def _of_step(self, step: int) -> tuple[int, list[Example]]:
        epoch = 0
        while step >= self._count(epoch):
            step -= self._count(epoch)
            epoch += 1
        return self._plan(epoch)[step]

    def _count(self, epoch: int) -> int:
        if epoch == len(self._counts):
            self._counts.append(len(self._plan(epoch)))
        return self._counts[epoch]

    def _plan(self, epoch: int) -> list[tuple[int, list[Example]]]:
        """The windows of an epoch: (bucket, examples)."""
        if epoch not in self._plans:
            while len(self._plans) >= KEPT:
                del self._plans[min(self._plans)]
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> list[tuple[int, list[Example]]]:
        examples = list(self._examples)
        random = None if self._seed is None else np.random.Generator(np.random.PCG64([self._seed, epoch]))
        if random is not None:
            examples = [examples[index] for index in random.permutation(len(examples))]
        if self._pack_length:
            examples = pack(examples, self._pack_length)
        size = self._micro_batches * self._micro_batch_size
        windows, left = [], []
        for low, bucket in zip((0, *self.buckets), self.buckets):
            left += [example for example in examples if low < example.length <= bucket]
            full = len(left) // size * size
            windows += [(bucket, left[start : start + size]) for start in range(0, full, size)]
            left = left[full:]
        if left:
            windows.append((self.buckets[-1], left))
        if random is not None:
            windows = [windows[index] for index in random.permutation(len(windows))]
        return windows
