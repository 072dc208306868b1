"""Which adapter has which slot of the bank on the device. Bookkeeping only: no arrays, no threads, no locks."""

import collections
import dataclasses
from collections.abc import Hashable


@dataclasses.dataclass(frozen=True)
class Acquired:
    """A slot that is held until `release`. Whoever gets it `fresh` has to load the adapter into it."""

    slot: int
    fresh: bool


@dataclasses.dataclass
class _Holder:
    slot: int
    references: int = 0
    loaded: bool = False


class DeviceSlots:
    """Slots 0 to n - 1 with reference counts; of those that nobody holds, the least recently used one is given away first.

    A load takes a reference of its own (`acquire` when it starts, `release` when it ends), so that its slot can't go to another
    adapter while it is being written, whatever becomes of the requests that wait for it.
    """

    def __init__(self, n: int):
        self._free = list(range(n - 1, -1, -1))
        self._holders: dict[Hashable, _Holder] = {}
        self._idle: collections.OrderedDict[Hashable, None] = collections.OrderedDict()
        self.evicted = 0

    def acquire(self, key: Hashable) -> Acquired | None:
        """Takes a reference on the slot of an adapter; None while all slots are held by others."""
        holder = self._holders.get(key)
        fresh = holder is None
        if holder is None:
            if self._free:
                holder = _Holder(self._free.pop())
            elif self._idle:
                evicted, _ = self._idle.popitem(last=False)
                holder = _Holder(self._holders.pop(evicted).slot)
                self.evicted += 1
            else:
                return None
            self._holders[key] = holder
        holder.references += 1
        self._idle.pop(key, None)
        return Acquired(holder.slot, fresh)

    def release(self, key: Hashable) -> None:
        """Gives one reference back. With the last one a loaded adapter stays where it is until its slot is needed."""
        holder = self._holders[key]
        if holder.references == 0:
            raise ValueError(f"{key} is not held")
        holder.references -= 1
        if holder.references:
            return
        if holder.loaded:
            self._idle[key] = None
        else:
            del self._holders[key]
            self._free.append(holder.slot)

    def set_loaded(self, key: Hashable) -> None:
        """The slot holds the adapter from now on."""
        self._holders[key].loaded = True

    def is_loaded(self, key: Hashable) -> bool:
        """Whether the adapter is on the device, held or not."""
        holder = self._holders.get(key)
        return holder is not None and holder.loaded

    def slot(self, key: Hashable) -> int | None:
        """The slot of an adapter, or None."""
        holder = self._holders.get(key)
        return None if holder is None else holder.slot

    def keys(self) -> list[Hashable]:
        """The adapters that have a slot."""
        return list(self._holders)

    def __len__(self) -> int:
        """How many adapters have a slot."""
        return len(self._holders)
