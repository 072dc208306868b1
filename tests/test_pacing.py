"""The pace of streams, on a simulated clock."""

import random

import pytest

from server.pacing import Pace


def run(streams: int, step_s: float, steps: int, rate: float) -> dict[int, list[tuple[float, int]]]:
    """Tokens come every `step_s` for every stream; gives for each the times of its responses, and how many tokens each carried."""
    pace: Pace[int] = Pace(rate)
    gathered, sent = dict.fromkeys(range(streams), 0), {stream: [] for stream in range(streams)}

    def flush(stream: int, now: float) -> None:
        sent[stream].append((now, gathered[stream]))
        gathered[stream] = 0

    queued: set[int] = set()
    for step in range(steps):
        now = step * step_s
        while (wait := pace.wait(now - step_s)) is not None and wait <= step_s:
            for stream in pace.take(now - step_s + wait):
                queued.discard(stream)
                flush(stream, now - step_s + wait)
        for stream in range(streams):
            gathered[stream] += 1
            if stream not in queued:
                if pace.due(stream, now):
                    flush(stream, now)
                else:
                    queued.add(stream)
    for stream in range(streams):
        flush(stream, steps * step_s)
        pace.ended(stream)
    return sent


def test_one_stream_gets_every_token_at_once() -> None:
    assert run(1, 0.01, 50, rate=300)[0][:-1] == [(pytest.approx(step * 0.01), 1) for step in range(50)]


def test_many_streams_share_the_rate_and_lose_nothing() -> None:
    sent = run(16, 0.016, 400, rate=300)
    for responses in sent.values():
        assert sum(count for _, count in responses) == 400
        assert responses[0] == (0, 1)  # the first token waits for nothing
        gaps = [after - before for (before, _), (after, _) in zip(responses[1:], responses[2:-1])]
        assert 0.9 * 16 / 300 < min(gaps) and max(gaps) < 1.5 * 16 / 300
    assert 0.8 * 300 < sum(map(len, sent.values())) / (400 * 0.016) < 1.1 * 300


def test_a_stream_that_ended_is_not_given_and_makes_room() -> None:
    pace: Pace[str] = Pace(10)
    assert all(pace.due(stream, 0.0) for stream in "ab")
    assert not pace.due("a", 0.01) and not pace.due("b", 0.02)
    assert pace.wait(0.05) == pytest.approx(0.15)
    pace.ended("a")
    assert pace.take(0.1) == [] and pace.take(0.2) == ["b"]
    assert pace.wait(0.2) is None
    assert pace.due("b", 0.31)  # alone it waits a tenth of a second only


def test_streams_come_in_the_order_in_which_they_are_due() -> None:
    pace: Pace[int] = Pace(100)
    times = [random.Random(0).random() for _ in range(20)]
    for stream, at in enumerate(times):
        pace.due(stream, at)
    for stream in range(20):
        assert not pace.due(stream, times[stream] + 0.001)
    assert pace.take(10.0) == sorted(range(20), key=times.__getitem__)
