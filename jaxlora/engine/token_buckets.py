"""Token rates: how many tokens of prompts and answers each adapter and each user may use in a second.

A request takes all that it may come to need when it arrives, and gives back what it did not use when it ends. Pure: seconds come from
the caller, who also sees to it that one thread calls at a time.
"""

import dataclasses
import math

from jaxlora.engine.limits import Account, Bounds, Limits, Party
from jaxlora.errors import Unavailable


@dataclasses.dataclass
class _Bucket:
    """Tokens at hand at a time in seconds; below 0 after a request for more than a full bucket."""

    level: float
    at: float


class TokenBuckets:
    """One bucket for each adapter and each user that has a rate: it holds `burst_s` seconds' worth and fills up at the rate."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._buckets: dict[Party, _Bucket] = {}

    def take(self, account: Account, tokens: int, now: float) -> None:
        """Takes tokens for a request, or none at all. One that needs more than a full bucket is let through when the bucket is full.

        Raises:
            Unavailable: a rate is used up; it says which, and when there is enough for this request.
        """
        parties = self._limited(account)
        for party, bounds in parties:
            bucket, full = self._filled(party, bounds, now), self._full(bounds)
            missing = min(tokens, full) - bucket.level
            if missing > 0:
                text = f"{party} uses more than {bounds.tokens_per_s:g} tokens a second ({party.setting('TOKENS_PER_S')})"
                raise Unavailable(text, math.ceil(10 * missing / bounds.tokens_per_s) / 10, "rate_limited")
        for party, _ in parties:
            self._buckets[party].level -= tokens

    def give_back(self, account: Account, tokens: int) -> None:
        """Returns tokens that `take` took."""
        for party, _ in self._limited(account):
            self._buckets[party].level += tokens

    def _limited(self, account: Account) -> list[tuple[Party, Bounds]]:
        return [(party, bounds) for party, bounds in self._limits.of(account) if bounds.tokens_per_s]

    def _full(self, bounds: Bounds) -> float:
        return bounds.tokens_per_s * self._limits.burst_s

    def _filled(self, party: Party, bounds: Bounds, now: float) -> _Bucket:
        full = self._full(bounds)
        bucket = self._buckets.setdefault(party, _Bucket(full, now))
        bucket.level = min(full, bucket.level + (now - bucket.at) * bounds.tokens_per_s)
        bucket.at = now
        return bucket
