"""Token rates, on times that each test makes up."""

import pytest

from jaxlora.engine import Account, Bounds, Limits
from jaxlora.engine.token_buckets import TokenBuckets
from jaxlora.errors import Unavailable

SQL, MAIL, OTHER = Account("alice/sql", "alice"), Account("alice/mail", "alice"), Account("bob/sql", "bob")


def missing(buckets, account, tokens, now) -> float:
    """The seconds that a request is told to wait."""
    with pytest.raises(Unavailable) as caught:
        buckets.take(account, tokens, now)
    return caught.value.retry_after_s


def test_without_a_rate_nothing_is_refused():
    buckets = TokenBuckets(Limits())
    for _ in range(100):
        buckets.take(SQL, 1_000_000, 0.0)


def test_a_bucket_begins_full_and_fills_at_its_rate():
    buckets = TokenBuckets(Limits(burst_s=5, adapter=Bounds(tokens_per_s=10)))
    buckets.take(SQL, 50, 100.0)
    assert missing(buckets, SQL, 20, 100.0) == 2.0
    assert missing(buckets, SQL, 20, 101.0) == 1.0
    buckets.take(SQL, 20, 102.0)
    buckets.take(MAIL, 50, 102.0)


def test_it_never_holds_more_than_the_burst():
    buckets = TokenBuckets(Limits(burst_s=5, user=Bounds(tokens_per_s=10)))
    buckets.take(SQL, 50, 0.0)
    buckets.give_back(SQL, 50)
    buckets.take(SQL, 50, 1000.0)
    assert missing(buckets, MAIL, 1, 1000.0) == 0.1
    buckets.take(OTHER, 50, 1000.0)


def test_what_needs_more_than_the_burst_waits_for_a_full_bucket_and_is_paid_for_later():
    buckets = TokenBuckets(Limits(burst_s=5, adapter=Bounds(tokens_per_s=10)))
    buckets.take(SQL, 10, 0.0)
    assert missing(buckets, SQL, 200, 0.0) == 1.0
    buckets.take(SQL, 200, 1.0)
    assert missing(buckets, SQL, 10, 1.0) == 16.0


def test_what_one_rate_refuses_is_not_taken_from_the_other():
    limits = Limits(burst_s=1, adapter=Bounds(tokens_per_s=100), user=Bounds(tokens_per_s=50))
    buckets = TokenBuckets(limits)
    buckets.take(SQL, 40, 0.0)
    for _ in range(3):
        with pytest.raises(Unavailable, match=r"alice uses more than 50 tokens a second \(TOKENS_PER_S_PER_USER\); try again in 0.4 s"):
            buckets.take(SQL, 30, 0.0)
    buckets.take(SQL, 50, 1.0)


def test_the_rate_over_a_long_time_is_the_one_that_was_set():
    buckets = TokenBuckets(Limits(burst_s=10, adapter=Bounds(tokens_per_s=100)))
    served = 0
    for tick in range(10_000):
        try:
            buckets.take(SQL, 70, tick / 100)
            served += 70
        except Unavailable:
            pass
    assert served == pytest.approx(100 * 100 + 1000, abs=70)
