"""The breakers on a clock of the test: when they open, whom they let pass, when they close."""

import pytest

from jaxlora.engine.breakers import MIN_VALUES, AdapterBreaker, LatencyBreaker, MemoryBreaker, State
from jaxlora.engine.health import Health, Thresholds
from jaxlora.errors import EngineError, Unavailable


class TestLatency:
    def breaker(self, **bounds) -> LatencyBreaker:
        return LatencyBreaker({"token": 0.1, "queue": 2.0} | bounds, window_s=10, open_s=5)

    def test_a_mean_over_the_bound_opens_it_and_a_few_values_do_not(self):
        breaker = self.breaker()
        for at in range(MIN_VALUES - 1):
            breaker.observe("token", 1.0, at)
        assert breaker.state(6) is State.CLOSED and breaker.refusal_s(7) == 0
        breaker.observe("token", 1.0, 7)
        assert breaker.state(7) is State.OPEN and breaker.refusal_s(8) == 4
        assert breaker.cause == "the token is 1 s on average; the bound is 0.1 s"

    def test_what_is_older_than_the_window_does_not_count(self):
        breaker = self.breaker()
        for at in range(100):
            breaker.observe("token", 1.0, 3 * at)
        assert breaker.state(300) is State.CLOSED

    def test_probes_below_the_bounds_close_it(self):
        breaker = self.breaker()
        for _ in range(MIN_VALUES):
            breaker.observe("token", 1.0, 0)
        assert [breaker.refusal_s(5) for _ in range(MIN_VALUES + 1)] == [0] * MIN_VALUES + [5], "so many probes, then a wait"
        assert breaker.state(5) is State.HALF_OPEN
        for _ in range(MIN_VALUES):
            breaker.observe("token", 0.01, 6)
        assert breaker.state(6) is State.HALF_OPEN, "nothing is known of the queue yet"
        for _ in range(MIN_VALUES):
            breaker.observe("queue", 0.01, 6)
        assert breaker.state(6) is State.CLOSED and breaker.refusal_s(6) == 0

    def test_few_good_values_at_a_time_close_it_too(self):
        breaker = self.breaker(queue=0)
        for _ in range(MIN_VALUES):
            breaker.observe("token", 1.0, 0)
        for count in range(MIN_VALUES):
            now = 10 + 4 * count
            assert breaker.refusal_s(now) == 0 and breaker.state(now) is State.HALF_OPEN
            breaker.observe("token", 0.01, now)
        assert breaker.state(now) is State.CLOSED

    def test_it_is_half_open_when_its_time_is_over_whether_or_not_somebody_asks(self):
        breaker = self.breaker()
        for _ in range(MIN_VALUES):
            breaker.observe("token", 1.0, 0)
        assert [breaker.state(now) for now in (0, 4.9, 5, 1000)] == [State.OPEN, State.OPEN, State.HALF_OPEN, State.HALF_OPEN]

    def test_probes_over_a_bound_open_it_again(self):
        breaker = self.breaker(queue=0)
        for now in (0, 5):
            breaker.refusal_s(now)
            for _ in range(MIN_VALUES):
                breaker.observe("token", 1.0, now)
            assert breaker.state(now) is State.OPEN and breaker.refusal_s(now) == 5

    def test_probes_that_tell_nothing_are_followed_by_others(self):
        breaker = self.breaker()
        for _ in range(MIN_VALUES):
            breaker.observe("token", 1.0, 0)
        for now in (5, 10, 15):
            assert [breaker.refusal_s(now) for _ in range(MIN_VALUES + 1)][-2:] == [0, 5]

    def test_a_bound_of_zero_is_none(self):
        breaker = self.breaker(token=0, queue=0)
        for _ in range(100):
            breaker.observe("token", 1e9, 0)
        assert breaker.state(0) is State.CLOSED


class TestAdapter:
    def test_one_that_fails_again_and_again_is_refused_alone_and_forgiven_after_a_success(self):
        breaker = AdapterBreaker(3, open_s=30)
        assert [breaker.failed("bad", "NaN", now) for now in range(3)] == [False, False, True]
        assert (breaker.refusal_s("bad", 12), breaker.refusal_s("good", 12), breaker.state(12)) == (20, 0, State.OPEN)
        assert [breaker.state(32), breaker.refusal_s("bad", 32), breaker.refusal_s("bad", 33)] == [State.HALF_OPEN, 0, 29], "one probe"
        breaker.succeeded("bad")
        assert breaker.refusal_s("bad", 34) == 0 and breaker.state(34) is State.CLOSED

    def test_a_probe_that_fails_has_it_refused_again(self):
        breaker = AdapterBreaker(1, open_s=30)
        breaker.failed("bad", "NaN", 0)
        assert not breaker.failed("bad", "NaN", 1), "one that had been accepted before"
        assert breaker.refusal_s("bad", 30) == 0
        assert breaker.failed("bad", "gone", 31) and breaker.refusal_s("bad", 31) == 30 and breaker.cause("bad") == "gone"

    def test_failures_with_successes_between_them_are_forgiven(self):
        breaker = AdapterBreaker(2, open_s=30)
        for now in range(10):
            assert not breaker.failed("a", "x", now)
            breaker.succeeded("a")

    def test_it_remembers_so_many_and_no_more(self):
        breaker = AdapterBreaker(1, open_s=30, keep=2)
        for name in "abc":
            breaker.failed(name, "x", 0)
        assert [breaker.refusal_s(name, 0) for name in "abc"] == [0, 30, 30]


class TestMemory:
    def test_fewer_rows_run_after_a_failure_and_they_come_back_one_by_one(self):
        breaker = MemoryBreaker(8, grow_s=10)
        breaker.failed(8, 0)
        assert [breaker.allowed(now) for now in (0, 9, 10, 25, 39)] == [4, 4, 5, 6, 7]
        assert breaker.state is State.HALF_OPEN
        assert breaker.allowed(40) == 8 and breaker.state is State.CLOSED

    def test_one_may_always_run(self):
        breaker = MemoryBreaker(8, grow_s=10)
        for rows, left in ((8, 4), (3, 2), (4, 2), (2, 1), (2, 1)):
            breaker.failed(rows, 0)
            assert breaker.allowed(0) == left
        assert breaker.state is State.OPEN


class TestHealth:
    def test_a_refusal_says_why_and_for_how_long(self):
        now = [0.0]
        health = Health(Thresholds(token_s=0.1, open_s=5), 4, lambda: now[0])
        for _ in range(MIN_VALUES + 1):
            health.stepped(True)
            now[0] += 1
        with pytest.raises(Unavailable, match=r"time per output token is 1 s on average; the bound is 0.1 s; try again in 4 s") as refusal:
            health.check(None)
        assert refusal.value.reason == "latency" and health.states()["latency"] is State.OPEN

    def test_a_pause_is_no_slow_token(self):
        now = [0.0]
        health = Health(Thresholds(token_s=0.1), 4, lambda: now[0])
        for _ in range(50):
            health.stepped(True)
            health.stepped(False)
            now[0] += 1
        health.check(None)

    def test_an_adapter_is_not_blamed_for_what_passes(self):
        health = Health(Thresholds(adapter_failures=1), 4)
        health.adapter_failed("a", Unavailable("no memory"))
        health.adapter_failed(None, EngineError("x"))
        health.check("a")
        health.adapter_failed("a", EngineError("not finite"))
        with pytest.raises(Unavailable, match="not finite; try again in 30 s") as refusal:
            health.check("a")
        assert refusal.value.reason == "adapter_failing"
        health.check("b")
