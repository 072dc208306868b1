"""How much of the engine one adapter, one user, and all together may take."""

import dataclasses
from typing import NamedTuple


class Party(NamedTuple):
    """An adapter or a user, as `kind` says: whoever a bound holds for. Without a name it is the base model, which has no user."""

    kind: str
    name: str

    def __str__(self) -> str:
        return self.name or "the base model"

    def setting(self, bound: str) -> str:
        """The setting of one of its bounds."""
        return f"{bound}_PER_{self.kind.upper()}"


@dataclasses.dataclass(frozen=True)
class Account:
    """Whom a request counts for: an adapter, whatever its version, and the user that it belongs to. Empty: the base model."""

    adapter: str = ""
    user: str = ""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What one adapter, or one user, may have at a time: requests running and waiting, and tokens a second. 0: no bound."""

    max_running: int = 0
    max_queue: int = 0
    tokens_per_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """What holds for all, and for each adapter and each user.

    `max_queue` requests may wait for a slot, each for `queue_timeout_s` seconds. The last `reserved_slots` of the engine's slots go to adapters
    that hold less than an equal share of the others. `burst_s` seconds' worth of a party's tokens may come at once. `prefix_cache` says whether
    prompts that begin alike share what was computed.
    """

    max_queue: int = 256
    queue_timeout_s: float = 120.0
    reserved_slots: int = 0
    burst_s: float = 10.0
    prefix_cache: bool = True
    adapter: Bounds = Bounds()
    user: Bounds = Bounds()

    def of(self, account: Account) -> tuple[tuple[Party, Bounds], ...]:
        """The parties that a request counts for, with their bounds."""
        return (Party("adapter", account.adapter), self.adapter), (Party("user", account.user), self.user)
