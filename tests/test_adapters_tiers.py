"""The tiers: the host cache keeps what fits and reads each adapter once; a held device slot is never given away."""

import threading

import numpy as np
import pytest

from jaxlora.adapters import DeviceSlots, HostCache
from jaxlora.errors import AdapterInvalid, Unavailable
from tests.adapter_folders import adapter

ADAPTERS = [adapter(seed) for seed in range(8)]
SIZE = ADAPTERS[0].nbytes


class Reader:
    """Reads adapters by their number, counts the reads, and waits where it is told to."""

    def __init__(self):
        self.reads, self.go = [], threading.Event()
        self.go.set()

    def __call__(self, key):
        self.reads.append(key)
        assert self.go.wait(5)
        if key < 0:
            raise AdapterInvalid(["broken"])
        return ADAPTERS[key]


@pytest.fixture
def reader():
    return Reader()


def test_an_adapter_is_read_once_however_many_ask(reader):
    cache = HostCache(10 * SIZE, reader)
    reader.go.clear()
    futures = [cache.get(3) for _ in range(20)]
    assert not any(future.done() for future in futures)  # nobody waits for the disk inside `get`
    reader.go.set()
    assert all(future.result(5) is ADAPTERS[3] for future in futures)
    assert cache.get(3).result(5) is ADAPTERS[3]
    assert reader.reads == [3]
    assert cache.stats() == dict(hits=20, misses=1, evictions=0, adapters=1, bytes=SIZE)
    cache.close()


def test_the_least_recently_used_goes_first(reader):
    cache = HostCache(3 * SIZE, reader, threads=1)
    for key in (0, 1, 2, 0, 3):
        cache.get(key).result(5)
    assert cache.stats() == dict(hits=1, misses=4, evictions=1, adapters=3, bytes=3 * SIZE)
    for key in (0, 2, 3):
        cache.get(key).result(5)
    assert reader.reads == [0, 1, 2, 3]
    cache.get(1).result(5)
    assert reader.reads[-1] == 1
    cache.close()


@pytest.mark.parametrize("capacity", [0, SIZE - 1])
def test_what_does_not_fit_is_handed_out_and_not_kept(reader, capacity):
    cache = HostCache(capacity, reader)
    assert cache.get(0).result(5) is ADAPTERS[0]
    assert cache.stats() == dict(hits=0, misses=1, evictions=0, adapters=0, bytes=0)
    assert cache.get(0).result(5) is ADAPTERS[0]
    assert reader.reads == [0, 0]
    cache.close()


def test_a_failure_reaches_those_who_wait_and_is_not_remembered(reader):
    cache = HostCache(10 * SIZE, reader)
    reader.go.clear()
    futures = [cache.get(-1), cache.get(-1)]
    assert futures[0].cancel() is False  # one who gives up must not take it from the other
    reader.go.set()
    for future in futures:
        with pytest.raises(AdapterInvalid):
            future.result(5)
    with pytest.raises(AdapterInvalid):
        cache.get(-1).result(5)
    assert reader.reads == [-1, -1]
    cache.close()


def test_closing_ends_every_wait(reader):
    cache = HostCache(10 * SIZE, reader, threads=1)
    reader.go.clear()
    running, waiting = cache.get(0), cache.get(1)
    threading.Timer(0.1, reader.go.set).start()
    cache.close()
    assert running.result(0) is ADAPTERS[0]
    with pytest.raises(Unavailable):
        waiting.result(0)
    with pytest.raises(Unavailable):
        cache.get(2)


def test_the_bytes_kept_never_pass_the_capacity_under_many_threads(reader):
    cache = HostCache(3 * SIZE, reader, threads=4)
    random = np.random.default_rng(0)
    orders = [random.integers(0, 8, 200) for _ in range(4)]
    wrong = []

    def work(order):
        for key in order:
            if cache.get(int(key)).result(5) is not ADAPTERS[key] or cache.stats()["bytes"] > 3 * SIZE:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.close()
    assert wrong == [] and cache.stats()["bytes"] == 0


def test_slots_are_shared_held_and_given_away_in_the_order_of_their_last_use():
    slots = DeviceSlots(2)
    a, b = slots.acquire("a"), slots.acquire("b")
    assert a.fresh and b.fresh and {a.slot, b.slot} == {0, 1}
    assert slots.acquire("a").slot == a.slot and not slots.acquire("a").fresh
    assert slots.acquire("c") is None
    slots.set_loaded("a"), slots.set_loaded("b")
    slots.release("b")
    for _ in range(3):
        assert slots.is_loaded("a")
        slots.release("a")
    assert slots.acquire("b").slot == b.slot  # still there, and used again
    slots.release("b")
    c = slots.acquire("c")
    assert (c.slot, c.fresh) == (a.slot, True) and slots.slot("a") is None and not slots.is_loaded("a")
    assert slots.acquire("a").slot == b.slot and slots.acquire("b") is None


def test_a_slot_that_was_never_loaded_is_free_after_the_last_release():
    slots = DeviceSlots(1)
    slots.acquire("a"), slots.acquire("a")
    slots.release("a")
    assert slots.acquire("b") is None
    slots.release("a")
    assert len(slots) == 0 and slots.acquire("b").fresh
    slots.release("b")
    assert slots.acquire("a").fresh
    slots.release("a")
    with pytest.raises(KeyError):
        slots.release("a")


def test_more_releases_than_acquires_are_an_error():
    slots = DeviceSlots(1)
    slots.acquire("a")
    slots.set_loaded("a")
    slots.release("a")
    with pytest.raises(ValueError, match="not held"):
        slots.release("a")


def test_random_use_never_gives_one_slot_to_two_adapters():
    random = np.random.default_rng(0)
    slots, held = DeviceSlots(4), {}
    for _ in range(3000):
        key = int(random.integers(0, 10))
        if random.random() < 0.5:
            got = slots.acquire(key)
            if got is None:
                assert key not in held and len(held) == 4
                continue
            count, slot = held.get(key, (0, got.slot))
            assert slot == got.slot and (count == 0 or not got.fresh)
            held[key] = (count + 1, slot)
            if got.fresh and random.random() < 0.8:
                slots.set_loaded(key)
        elif key in held:
            slots.release(key)
            count, slot = held.pop(key)
            if count > 1:
                held[key] = (count - 1, slot)
        assert len({slot for _, slot in held.values()}) == len(held)
