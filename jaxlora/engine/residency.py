"""Adapters on their way to the device: read and packed in the background, placed between two steps, held by reference count."""

import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from jaxlora.adapters.device_slots import DeviceSlots
from jaxlora.engine.program import Program
from jaxlora.errors import EngineError, ServingError
from jaxlora.lora import Pair

MAX_PENDING = 4


class HostAdapter(Protocol):
    """An adapter in host memory: its modules by Hugging Face path, and its largest rank."""

    modules: Mapping[str, Pair]
    rank: int


@dataclasses.dataclass
class _Load:
    """An adapter on its way, and since when somebody has been waiting for it; None: nobody does any more."""

    packed: "Future[tuple[np.ndarray, int]]"
    since: float | None


class Residency:
    """Which adapters are on the device. Used by the engine's thread, but for `expect`; reading and packing happen in other threads.

    `put_adapter` places one, as `Program.put_adapter`; `read` gives the future of an adapter in host memory; `wake` is called, from any
    thread, when an adapter is ready to be placed. `placed` is told of each one that is on the device, how many seconds after it was first
    waited for.
    """

    def __init__(
        self,
        program: Program,
        put_adapter: Callable[[int, np.ndarray, int], None],
        read: Callable[[Hashable], "Future[HostAdapter]"],
        wake: Callable[[], None],
        placed: Callable[[float], None] = lambda seconds: None,
    ):
        self._pack, self._put_adapter = program.pack, put_adapter
        self._read, self._wake, self._placed = read, wake, placed
        self._slots = DeviceSlots(program.sizes.lora_slots)
        self._lock = threading.Lock()
        self._loads: dict[Hashable, _Load] = {}
        self._packer = ThreadPoolExecutor(1, thread_name_prefix="adapter-packer")
        self.placed = 0

    @property
    def evicted(self) -> int:
        """Adapters that left the device since the start, as another one needed their slot."""
        return self._slots.evicted

    def expect(self, key: Hashable) -> None:
        """Somebody is going to wait for the adapter: it may as well be on its way already. Any thread may call this."""
        with self._lock:
            if self._slots.slot(key) is None:  # one that is being placed has a slot, and is no longer on its way
                self._wanted(key)

    def try_acquire(self, key: Hashable) -> int | None:
        """The bank slot of an adapter, held until `release`; None while it is on its way or every slot is in use.

        At most one adapter is placed by a call, so that running rows never wait for more than one copy.

        Raises:
            ServingError: the adapter can't be read or placed; the next call tries again.
        """
        if self._slots.is_loaded(key):
            return self._slots.acquire(key).slot
        with self._lock:
            load = self._wanted(key)
            if load is None or not load.packed.done():
                return None
            if load.packed.exception() is not None:
                del self._loads[key]
                raise _failure(load.packed.exception())
            acquired = self._slots.acquire(key)
            if acquired is None:
                return None
            del self._loads[key]
        try:
            self._put_adapter(acquired.slot, *load.packed.result())
        except Exception:
            self._slots.release(key)
            raise
        self._slots.set_loaded(key)
        self.placed += 1
        self._placed(time.monotonic() - load.since)
        return acquired.slot

    def give_up(self, key: Hashable) -> None:
        """Nobody waits for the adapter any more. If it is on its way, it makes room for others once it has come, unless somebody asks for it
        before."""
        with self._lock:
            if key in self._loads:
                self._loads[key].since = None

    def release(self, key: Hashable) -> None:
        """Gives a reference back; the adapter stays until its slot is needed."""
        self._slots.release(key)

    def resident(self) -> list[Hashable]:
        """The adapters that have a slot on the device. Any thread may call it."""
        return self._slots.keys()

    def close(self) -> None:
        """Waits for the packing thread to end."""
        self._packer.shutdown(wait=True, cancel_futures=True)

    def _wanted(self, key: Hashable) -> _Load | None:
        """The adapter on its way, for which somebody waits now. None: too many others are."""
        self._loads = {each: load for each, load in self._loads.items() if load.since is not None or not load.packed.done()}
        now = time.monotonic()
        load = self._loads.get(key)
        if load is not None:
            load.since = load.since or now
        elif len(self._loads) < MAX_PENDING:
            load = self._loads[key] = _Load(self._start(key), now)
        return load

    def _start(self, key: Hashable) -> "Future[tuple[np.ndarray, int]]":
        packed: Future[tuple[np.ndarray, int]] = Future()

        def deliver(done: "Future[HostAdapter]") -> None:
            try:
                self._packer.submit(pack, done)
            except RuntimeError as error:  # closed meanwhile
                packed.set_exception(error)

        def pack(done: "Future[HostAdapter]") -> None:
            try:
                adapter = done.result()
                packed.set_result((self._pack(adapter.modules, adapter.rank), adapter.rank))
            except BaseException as error:
                packed.set_exception(error)
            self._wake()

        try:
            self._read(key).add_done_callback(deliver)
        except Exception as error:
            packed.set_exception(error)
        return packed


def _failure(error: BaseException) -> ServingError:
    return error if isinstance(error, ServingError) else EngineError(f"the adapter can't be loaded: {error}")
