"""Several decode steps in one call: when there are, and that answers come out as by single steps, on every backend of this machine."""

import dataclasses
import types

import numpy as np
import pytest

from jaxlora.engine import Engine, Request, SamplingParams, stepper
from tests.parity import checkpoints
from tests.test_engine import NAMES, SIZES, asked, folder, start  # noqa: F401
from tests.test_engine_scheduler import Counting, Readers, submit, until

STEPS = 4
GREEDY_WORD = (7, 8, 9, 10, 11)


@pytest.fixture(scope="module")
def single(start):  # noqa: F811
    return start(dataclasses.replace(SIZES, decode_steps=1))[0]


@pytest.fixture(scope="module")
def several(start):  # noqa: F811
    return start(dataclasses.replace(SIZES, decode_steps=STEPS))[0]


def tokens(engine, prompt=GREEDY_WORD, adapter=None, **params):
    return asked(engine, Request(tuple(prompt), SamplingParams(**{"max_tokens": 23, **params}), None, adapter)).tokens()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"max_tokens": 1},
        {"max_tokens": 2},
        {"max_tokens": 6},
        {"logprobs": 3},
        {"temperature": 0.9, "seed": 3, "logprobs": 2},
        {"temperature": 1.1, "seed": 4, "top_k": 9, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
        {"min_tokens": 6, "stop_token_ids": tuple(range(0, 256, 2))},
        {"bad_words": ((1,), (2, 3), (200,), (100, 101))},
    ],
    ids=str,
)
@pytest.mark.parametrize("adapter", [None, NAMES[1]])
def test_answers_are_the_same(single, several, params, adapter):
    assert tokens(several, adapter=adapter, **params) == tokens(single, adapter=adapter, **params)


@pytest.mark.parametrize("place", range(1, 8))
def test_a_stop_token_ends_an_answer_wherever_it_comes(single, several, place):
    stop = tokens(single)[place].id
    answers = [tokens(engine, stop_token_ids=(stop,)) for engine in (single, several)]
    assert answers[0] == answers[1] and stop not in [token.id for token in answers[1]]
    assert tokens(several) == tokens(single), "what the call went on to compute is in nobody's way"


def test_answers_of_several_lengths_side_by_side(single, several):
    asks = [Request((at, at + 1, at + 2), SamplingParams(max_tokens=3 * at, seed=at, temperature=0.7), None, NAMES[at % 2]) for at in range(1, 7)]
    expected = [asked(single, each).tokens() for each in asks]
    sinks = [asked(several, each) for each in asks]
    assert [sink.tokens() for sink in sinks] == expected


def test_the_end_of_the_cache_ends_an_answer(single, several):
    prompt = tuple(int(token) for token in np.random.default_rng(1).integers(0, checkpoints.VOCABULARY, SIZES.max_seq_len - 10))
    answer = tokens(several, prompt, max_tokens=100)
    assert len(answer) == 10 and answer == tokens(single, prompt, max_tokens=100)


def test_what_went_on_after_the_end_is_not_taken_for_the_beginning_of_a_prompt(single, several):
    stop = tokens(single)[5].id
    answer = [token.id for token in tokens(several, stop_token_ids=(stop,))]
    longer = (*GREEDY_WORD, *answer, 3, 4, 5, 6)
    assert tokens(several, longer, max_tokens=9) == tokens(single, longer, max_tokens=9)


def test_steps_are_counted_before_an_answer_is_told(several):
    before = several.load()["steps"]
    assert len(tokens(several, max_tokens=11)) == 11 and several.load()["steps"] - before == 10


@pytest.fixture
def engine():
    program = Counting(decode_steps=STEPS)
    engine = Engine(program, Readers())
    yield engine, program
    program.gate.set()
    engine.stop()


def test_a_call_has_as_many_steps_as_all_of_its_rows_have_left(engine):
    assert submit(engine[0], (5,), max_tokens=12).wait().tokens == list(range(6, 18))
    assert engine[1].tokens == [1, 4, 4, 3]


def test_while_a_prompt_is_read_or_an_adapter_is_on_its_way_steps_are_single():
    readers, program = Readers(), Counting(decode_steps=STEPS)
    engine = Engine(program, readers)
    try:
        program.gate.clear()
        waiting = submit(engine, (1,), adapter="a", max_tokens=2)
        running = submit(engine, (1,), max_tokens=50)
        program.gate.set()
        assert running.wait().tokens == list(range(2, 52)) and set(program.tokens) == {1}
        readers.arrive("a")
        assert waiting.wait().tokens == [2, 3]
        program.hold_after = len(program.steps) + 2
        running = submit(engine, (1,), max_tokens=60)
        until(lambda: not program.gate.is_set())
        begun = len(program.steps) + 1  # the one that is held back was planned before
        long = submit(engine, range(40), max_tokens=1)
        program.gate.set()
        assert long.wait().error is None and running.wait().error is None
        last = max(at for at, (shape, *_) in enumerate(program.steps) if shape == (1, 8))
        assert set(program.tokens[begun:last]) == {1} and program.tokens[last + 1 :].count(4) > 2
    finally:
        engine.stop()


def test_what_the_host_has_a_say_in_goes_step_by_step(engine):
    submit(engine[0], (1,), max_tokens=5, bad_words=((50, 51),)).wait()
    assert engine[1].tokens == [1] * 5
    submit(engine[0], (1,), max_tokens=12, min_tokens=4, stop_token_ids=(200,)).wait()
    assert engine[1].tokens[5:] == [1, 1, 1, 1, 4, 4]


@pytest.mark.parametrize("step_s, expected", [(0.001, [1, 4, 4, 4, 4]), (0.026, [1, 4, 3, 3, 3, 3]), (0.05, [1, 4, *[1] * 12])])
def test_a_slow_device_runs_fewer_steps_in_a_call(engine, monkeypatch, step_s, expected):
    engine, program = engine
    now, run = [0.0], program.run
    monkeypatch.setattr(stepper, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def slow(batch):
        now[0] += step_s * batch.steps
        return run(batch)

    program.run = slow
    submit(engine, (1,), max_tokens=17).wait()
    assert program.tokens == expected


def test_logits_that_are_not_finite_end_an_answer_where_they_come(engine):
    failed = submit(engine[0], (664,), max_tokens=30).wait()
    assert failed.tokens == [665, 666] and "not finite" in str(failed.error)
    assert engine[1].cleared == [0]
