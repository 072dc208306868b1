"""The launcher and the models, on both ends of their socket; and how long a launcher waits before it starts a server again."""

import threading

import pytest

from server.lifeline import Lifeline, Member, restarts
from server.restarts import Backoff


@pytest.fixture
def lifeline():
    lifeline = Lifeline(3)
    lifeline.open()
    yield lifeline
    lifeline.close()


def joined(lifeline, drain=lambda: None) -> Member:
    """A member that the launcher knows of."""
    before = lifeline.members()
    member = Member(drain, lifeline.environment)
    wait_for(lifeline, lambda: lifeline.members() == before + 1)
    return member


def wait_for(lifeline, condition):
    with lifeline._changed:
        assert lifeline._changed.wait_for(condition, 10)


def test_draining_waits_for_every_member(lifeline):
    drained = []
    members = [joined(lifeline, lambda number=number: drained.append(number)) for number in range(3)]
    lifeline.drain(10)
    assert sorted(drained) == [0, 1, 2] and lifeline.members() == 0 and lifeline.failure is None
    assert members


def test_one_that_takes_too_long_is_not_waited_for(lifeline):
    held = threading.Event()
    member = joined(lifeline, held.wait)
    lifeline.drain(0.05)
    assert lifeline.members() == 1 and member
    held.set()


def test_nobody_is_not_waited_for(lifeline):
    lifeline.drain(60)


def test_the_reason_of_an_engine_that_stopped_arrives_in_one_line(lifeline):
    joined(lifeline).stopped("the engine stopped:\n  no device")
    wait_for(lifeline, lambda: not lifeline.members())
    assert (lifeline.failure, lifeline.crashed) == ("the engine stopped: no device", False)


def test_one_that_says_goodbye_has_not_failed(lifeline):
    joined(lifeline).close()
    wait_for(lifeline, lambda: not lifeline.members())
    assert lifeline.failure is None


def test_one_that_ends_without_a_word_has_crashed(lifeline):
    joined(lifeline)._socket.shutdown(2)
    wait_for(lifeline, lambda: not lifeline.members())
    assert (lifeline.failure, lifeline.crashed) == ("the process of the model has ended", True)


def test_without_a_launcher_it_does_nothing(lifeline):
    member = Member(lambda: None, {})
    member.stopped("x")
    member.close()
    assert restarts({}) == 0 and restarts(lifeline.environment) == 3


def test_the_pause_doubles_up_to_a_bound_and_begins_anew_after_a_server_that_ran_long():
    backoff = Backoff(first_s=1, most_s=8, good_s=600)
    assert [backoff.pause_s(5) for _ in range(6)] == [1, 2, 4, 8, 8, 8]
    assert [backoff.pause_s(ran) for ran in (600, 5, 5)] == [1, 2, 4]
