"""The host tier: adapters in memory, the least recently used one goes first. Loading happens in background threads.

Knows adapters by their `AdapterVersion`; how one is read is the caller's business. Any thread may call it.
"""

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from jaxlora.adapters.catalogue import AdapterVersion
from jaxlora.errors import Unavailable
from jaxlora.peft import LoraAdapter


class HostCache:
    """Futures of adapters. What a future holds stays valid after the cache has let go of it."""

    def __init__(self, capacity_bytes: int, read: Callable[[AdapterVersion], LoraAdapter], threads: int = 2):
        """
        Arguments:
            capacity_bytes: of the tensors that are kept; an adapter larger than that is loaded and not kept.
            read: loads one adapter; what it raises reaches those who wait for that adapter, and the next `get` tries again.
        """
        self._capacity, self._read = capacity_bytes, read
        self._lock = threading.Lock()
        self._loading: dict[AdapterVersion, Future[LoraAdapter]] = {}
        self._kept: collections.OrderedDict[AdapterVersion, tuple[Future[LoraAdapter], int]] = collections.OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0
        self._closed = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="adapter-reader")

    def get(self, key: AdapterVersion) -> "Future[LoraAdapter]":
        """The adapter, or the promise of it. Never blocks on the disk; however many ask, it is read once."""
        with self._lock:
            if key in self._kept:
                self._hits += 1
                self._kept.move_to_end(key)
                return self._kept[key][0]
            future = self._loading.get(key)
            if future is not None:
                self._hits += 1
                return future
            if self._closed:
                raise Unavailable("the server is shutting down")
            self._misses += 1
            future = self._loading[key] = Future()
            future.set_running_or_notify_cancel()  # one waiter that gives up must not cancel it for the others
            self._pool.submit(self._load, key, future)
            return future

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what is held now: hits, misses, evictions, adapters, bytes."""
        with self._lock:
            return {
                "hits": self._hits,
                "misses": self._misses,
                "evictions": self._evictions,
                "adapters": len(self._kept),
                "bytes": self._bytes,
            }

    def clear(self) -> None:
        """Lets go of every adapter, so that its memory is free once nobody uses it any more; the next `get` reads it again."""
        with self._lock:
            self._evictions += len(self._kept)
            self._kept.clear()
            self._bytes = 0

    def close(self) -> None:
        """Lets go of everything. Adapters that are being read are finished, those that wait to be read are cancelled."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for future in self._loading.values():
                future.set_exception(Unavailable("the server is shutting down"))
            self._loading.clear()
            self._kept.clear()
            self._bytes = 0

    def _load(self, key: AdapterVersion, future: "Future[LoraAdapter]") -> None:
        try:
            adapter = self._read(key)
        except BaseException as error:
            with self._lock:
                del self._loading[key]
            future.set_exception(error)
            return
        # Counted before anyone can see the result, so that whoever has it finds the counters up to date.
        with self._lock:
            del self._loading[key]
            if adapter.nbytes <= self._capacity:
                self._kept[key] = (future, adapter.nbytes)
                self._bytes += adapter.nbytes
            while self._bytes > self._capacity:
                _, (_, nbytes) = self._kept.popitem(last=False)
                self._bytes -= nbytes
                self._evictions += 1
        future.set_result(adapter)
