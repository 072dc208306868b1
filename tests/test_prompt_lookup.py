"""Guesses from the text so far: what is guessed, and that answers come out bit for bit as without, on every backend of this machine."""

import dataclasses

import numpy as np
import pytest

from jaxlora.engine import Engine, Request, SamplingParams, slots
from jaxlora.engine.faults import FaultyProgram
from jaxlora.engine.lookup import LONGEST_PAUSE, Lookup
from jaxlora.faults import parse
from tests.parity import checkpoints
from tests.test_engine import NAMES, SIZES, asked, folder, start  # noqa: F401

GUESSES = 4
LENGTH = 60


def test_what_followed_the_same_tokens_is_guessed():
    lookup = Lookup([1, 2, 3, 9, 8, 7, 1, 2, 4, 5, 1, 2, 3])
    assert lookup.guess([], 3) == [9, 8, 7], "three equal tokens count more than the two that came last"
    assert lookup.guess([9], 2) == [8, 7]
    assert lookup.guess([9, 1, 2], 1) == [3], "the last place counts"
    assert lookup.guess([9, 1, 2, 6, 6], 4) == []


def test_what_repeats_itself_is_guessed_beyond_its_end():
    assert Lookup([5, 6, 5, 6, 5, 6]).guess([], 5) == [5, 6, 5, 6, 5]
    assert Lookup([5, 6, 5]).guess([], 5) == [] and Lookup([]).guess([], 5) == Lookup([5]).guess([], 5) == []


def test_wrong_guesses_make_for_fewer_of_them():
    lookup, pauses = Lookup([1, 2] * 10), []
    for _ in range(7):
        lookup.learn(0)
        pauses.append(next(count for count in range(100) if lookup.guess([], 1)))
    assert pauses == [1, 3, 7, 15, 31, LONGEST_PAUSE, LONGEST_PAUSE]
    lookup.learn(1)
    assert lookup.guess([], 1)


def requests():
    """Prompts that begin to repeat themselves and prompts that don't, for the base model and adapters."""
    rng = np.random.default_rng(3)
    for adapter in (None, *NAMES[:2]):
        word = [int(token) for token in rng.integers(0, checkpoints.VOCABULARY, 7)]
        yield Request(tuple(word * 4), SamplingParams(max_tokens=LENGTH), None, adapter)
        yield Request(tuple(word), SamplingParams(max_tokens=LENGTH), None, adapter)


def ids(sink):
    return [token.id for token in sink.tokens()]


@pytest.fixture(scope="module")
def plain(start):  # noqa: F811
    return start()


@pytest.fixture(scope="module")
def guessing(start):  # noqa: F811
    return start(dataclasses.replace(SIZES, guesses=GUESSES))


@pytest.fixture(scope="module")
def expected(plain):
    return [ids(asked(plain[0], request)) for request in requests()]


@pytest.fixture
def seer(expected, monkeypatch):
    """Has guesses come from the answers themselves, some with a mistake at the end, some with nothing else. (A model whose weights are
    random hardly ever goes on as it did before.)"""

    class Seer:
        def __init__(self, prompt):
            self._answer = next((answer for request, answer in zip(requests(), expected) if request.prompt == prompt), [])

        def guess(self, answer, most):
            found = self._answer[len(answer) : len(answer) + most]
            if found and len(answer) % 3 == 0:
                found[0 if len(answer) % 2 else -1] ^= 1
            return found

        def learn(self, right):
            pass

    monkeypatch.setattr(slots, "Lookup", Seer)


def test_answers_are_the_same_with_guesses(guessing, expected):
    assert [ids(asked(guessing[0], request)) for request in requests()] == expected


def test_right_guesses_spare_steps(guessing, seer, expected, backend):
    engine, program = guessing
    compiled, before = program.compiled(), engine.load()
    assert [ids(asked(engine, request)) for request in requests()] == expected
    load = engine.load()
    steps, right = load["steps"] - before["steps"], load["guessed_right"] - before["guessed_right"]
    tokens = sum(len(answer) - 1 for answer in expected)
    assert steps == tokens - right and program.compiled() == compiled
    assert (right > tokens / 2) if backend.cut_invariant else (load["guessed"] == 0 and program.guess_sizes == ())


def test_two_at_a_time_and_many_beside_them(guessing, seer, expected):
    engine, _ = guessing
    for at in (1, 2, 6):
        for first in range(0, 6, at):
            sinks = [asked(engine, request) for request in list(requests())[first : first + at]]
            assert [ids(sink) for sink in sinks] == expected[first : first + at]


def test_what_is_not_simply_the_likeliest_token_is_not_guessed(plain, guessing, seer):
    prompt = tuple(next(requests()).prompt)
    for params in (
        {"temperature": 0.8, "seed": 5}, {"repetition_penalty": 1.2}, {"logprobs": 2}, {"bad_words": ((1, 2),)},
        {"min_tokens": LENGTH, "stop_token_ids": (3,)},
    ):  # fmt: skip
        request = Request(prompt, SamplingParams(max_tokens=LENGTH, **params), None)
        before = guessing[0].load()["guessed"]
        assert ids(asked(guessing[0], request)) == ids(asked(plain[0], request))
        assert guessing[0].load()["guessed"] == before


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 17])
def test_an_answer_ends_where_it_should(guessing, seer, expected, length):
    request, answer = next(requests()), expected[0]
    short = dataclasses.replace(request, params=SamplingParams(max_tokens=length))
    assert ids(asked(guessing[0], short)) == answer[:length]
    stop = answer[length]
    stopped = dataclasses.replace(request, params=SamplingParams(max_tokens=LENGTH, stop_token_ids=(stop,)))
    assert ids(asked(guessing[0], stopped)) == answer[: answer.index(stop)]


def test_the_end_of_the_cache_ends_an_answer(plain, guessing):
    request = dataclasses.replace(next(requests()), prompt=next(requests()).prompt[:7] * 17)
    found = ids(asked(guessing[0], request))
    assert len(request.prompt) + len(found) == SIZES.max_seq_len and found == ids(asked(plain[0], request))


@pytest.fixture(scope="module")
def program(start):  # noqa: F811
    return start(dataclasses.replace(SIZES, guesses=GUESSES))[1]


@pytest.mark.parametrize("fault", ["state_lost", "exception", "out_of_memory"])
def test_a_fault_in_a_step_with_guesses_shows_nowhere(program, seer, expected, fault):
    program.reset()
    engine = Engine(FaultyProgram(program, parse(f"decode:{fault}:times=1")), None)
    try:
        assert ids(asked(engine, next(requests()))) == expected[0]
    finally:
        engine.stop()
