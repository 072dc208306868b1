"""The scheduler by itself: a program that counts upwards stands in for the model, so that every test takes milliseconds."""

import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest

from jaxlora.engine import Engine, Limits, Request, SamplingParams, Sizes
from jaxlora.engine.sampling import TOP, Sampled
from jaxlora.errors import Cancelled, EngineError, RequestTimeout, Unavailable

VOCAB = 1000


class Counting:
    """A program whose next token is the last one plus 1. `gate` lets a test hold a step back; it closes by itself after `hold_after`
    steps."""

    def __init__(self, slots=4, chunk=8, lora_slots=2, batch_sizes=(1, 2, 4), decode_steps=1, prefill_rows=1):
        self.sizes = Sizes(slots, 64, chunk, lora_slots, 4, decode_steps=decode_steps)
        self.batch_sizes = batch_sizes
        self.config = type("Config", (), {"vocab_size": VOCAB})
        self.cut_invariant, self.guess_sizes, self.prefill_rows, self.prefill_length = True, (), prefill_rows, chunk + prefill_rows - 1
        self.steps, self.lengths, self.placed, self.copies, self.cleared, self.tokens = [], [], [], [], [], []
        self.gate = threading.Event()
        self.gate.set()
        self.broken = None
        self.hold_after = None

    def run(self, batch):
        self.gate.wait()
        if self.broken:
            raise self.broken
        rows = [row for row in range(len(batch.slots)) if batch.lengths[row]]
        self.steps.append((batch.tokens.shape, [int(batch.slots[row]) for row in rows], [int(batch.adapters[row]) for row in rows]))
        if len(self.steps) == self.hold_after:
            self.gate.clear()
        self.lengths.append(batch.lengths[rows].tolist())
        last = np.append(batch.tokens, 0)[batch.offsets + np.maximum(batch.lengths - 1, 0)]
        self.tokens.append(batch.steps)
        inputs = last[:, None] + np.arange(batch.steps)
        ok = ~((inputs == 666) & (batch.lengths[:, None] > 0))
        nothing = np.zeros(inputs.shape), np.zeros((*inputs.shape, TOP), np.int32), np.zeros((*inputs.shape, TOP))
        return Sampled((inputs + 1).astype(np.int32), *nothing, ok)

    def pack(self, modules, rank):
        return np.zeros(1, np.float32)

    def put_adapter(self, slot, vector, rank):
        self.placed.append(slot)

    def reuse(self, source, slot, tokens, record):
        self.copies.append((source, slot, len(tokens)))

    def state_is_intact(self):
        return True

    def clear(self, slot):
        self.cleared.append(slot)

    def compiled(self):
        return 0


class Answer:
    """A sink that remembers, and that may ask to stop."""

    def __init__(self, stop_at=None):
        self.tokens, self.result, self.error = [], None, None
        self.stop_at = stop_at
        self.over = threading.Event()

    def token(self, token):
        self.tokens.append(token.id)
        return token.id == self.stop_at

    def finish(self, result):
        self.result = result
        self.over.set()

    def fail(self, error):
        self.error = error
        self.over.set()

    def wait(self):
        assert self.over.wait(10), "no answer"
        return self


class Adapter:
    modules = {}
    rank = 4


class Readers:
    """The host tier: adapters arrive when the test says so."""

    def __init__(self):
        self.futures = {}

    def __call__(self, key):
        return self.futures.setdefault(key, Future())

    def arrive(self, *keys):
        for key in keys:
            self(key).set_result(Adapter())


@pytest.fixture(params=[1, 4], ids=["apart", "mixed"])
def program(request):
    return Counting(prefill_rows=request.param)


@pytest.fixture
def readers():
    return Readers()


@pytest.fixture
def engine(program, readers):
    engine = Engine(program, readers, Limits(max_queue=3, queue_timeout_s=30))
    yield engine
    program.gate.set()
    engine.stop()


def submit(engine, prompt=(1, 2, 3), adapter=None, timeout_s=None, sink=None, **params):
    answer = sink or Answer()
    answer.handle = engine.submit(Request(tuple(prompt), SamplingParams(**params), answer, adapter, timeout_s))
    return answer


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come to that")


def test_an_answer_continues_its_prompt(engine):
    answer = submit(engine, (5,), max_tokens=4).wait()
    assert answer.tokens == [6, 7, 8, 9] and answer.result.reason == "length"
    assert (answer.result.prompt_tokens, answer.result.completion_tokens) == (1, 4)


def test_a_stop_token_ends_it_and_is_not_handed_out(engine):
    answer = submit(engine, (5,), max_tokens=40, stop_token_ids=(8,)).wait()
    assert answer.tokens == [6, 7] and answer.result.reason == "stop" and answer.result.completion_tokens == 3


def test_the_sink_can_stop_it(engine):
    answer = submit(engine, (5,), max_tokens=40, sink=Answer(stop_at=7)).wait()
    assert answer.tokens == [6, 7] and answer.result.reason == "stop"


def test_it_ends_at_the_longest_sequence(engine):
    answer = submit(engine, range(60), max_tokens=100).wait()
    assert len(answer.tokens) == 4 and answer.result.reason == "length"


@pytest.mark.parametrize("program", [1], indirect=True)
def test_a_long_prompt_goes_in_chunks_with_decode_steps_between(engine, program):
    program.hold_after = 3
    submit(engine, (1,), max_tokens=60)
    until(lambda: not program.gate.is_set())
    long = submit(engine, range(40), max_tokens=1)
    program.gate.set()
    long.wait()
    shapes = [shape for shape, *_ in program.steps]
    chunks = [index for index, shape in enumerate(shapes) if shape == (1, 8)][-5:]
    assert all(later - earlier == 2 for earlier, later in zip(chunks, chunks[1:])), "a decode step runs between two chunks"


@pytest.mark.parametrize("program", [4], indirect=True)
def test_a_long_prompt_is_read_in_steps_in_which_the_others_go_on(engine, program):
    program.hold_after = 3
    first = submit(engine, (1,), max_tokens=60)
    until(lambda: not program.gate.is_set())
    long = submit(engine, range(24), max_tokens=1)
    program.gate.set()
    assert first.wait().tokens == list(range(2, 62)) and long.wait().tokens == [24]
    begin = program.lengths.index([8, 1])
    assert program.lengths[begin : begin + 4] == [[8, 1], [8, 1], [8, 1], [1]]
    assert [shape for shape, *_ in program.steps[begin : begin + 4]] == [(4, 3)] * 3 + [(1, 1)]


def test_running_rows_share_a_step_of_the_smallest_size_that_fits(engine, program):
    program.gate.clear()
    answers = [submit(engine, (at,), max_tokens=20) for at in (10, 20, 30)]
    program.gate.set()
    for answer, at in zip(answers, (10, 20, 30)):
        assert answer.wait().tokens == list(range(at + 1, at + 21))
    assert ((4, 1), [0, 1, 2], [-1, -1, -1]) in program.steps
    assert {shape for shape, *_ in program.steps} <= {(1, 1), (2, 1), (4, 1), (4, 3) if program.prefill_rows > 1 else (1, 8)}


def test_one_batch_size_means_row_b_is_slot_b(readers):
    program = Counting(batch_sizes=(4,))
    engine = Engine(program, readers)
    try:
        assert submit(engine, (5,), max_tokens=3).wait().tokens == [6, 7, 8]
        assert all(shape in ((1, 8), (4, 1)) for shape, *_ in program.steps)
    finally:
        engine.stop()


def test_more_requests_than_slots_wait_and_all_are_answered(program, readers):
    engine = Engine(program, readers, Limits(max_queue=100))
    try:
        answers = [submit(engine, (at,), max_tokens=5) for at in range(30)]
        assert [answer.wait().tokens for answer in answers] == [list(range(at + 1, at + 6)) for at in range(30)]
    finally:
        engine.stop()


def test_who_waits_gets_a_slot_when_all_running_rows_end_in_the_same_step(readers):
    program = Counting(slots=2)
    program.gate.clear()
    engine = Engine(program, readers)
    # The first one is a token ahead, as the second came while it was prefilled.
    answers = [submit(engine, max_tokens=count) for count in (6, 5, 2)]
    program.gate.set()
    assert [len(answer.wait().tokens) for answer in answers] == [6, 5, 2]
    engine.stop()


def test_between_two_decode_steps_prompts_get_one_chunk_of_tokens_at_most(engine, program):
    program.gate.clear()
    answers = [submit(engine, (1, 2, 3), max_tokens=9)]
    until(lambda: engine.load()["running"] == 1)
    answers += [submit(engine, tuple(range(length)), max_tokens=9) for length in (3, 4, 11)]
    program.gate.set()
    assert all(answer.wait().error is None for answer in answers)
    if program.prefill_rows > 1:
        assert program.lengths[:5] == [[3], [3, 4, 1, 1], [8, 1, 1, 1], [2, 1, 1, 1], [1, 1, 1, 1]]
    else:
        assert program.lengths[:10] == [[3], [1], [3], [1, 1], [4], [1, 1, 1], [8], [1, 1, 1], [3], [1, 1, 1, 1]]


def test_a_prompt_that_begins_as_another_did_is_copied_or_goes_on_in_place(engine, program):
    program.hold_after = 2
    first = submit(engine, tuple(range(20)), max_tokens=9)
    until(lambda: not program.gate.is_set())
    program.hold_after = None
    other = submit(engine, (*range(18), 7), max_tokens=9)
    until(lambda: engine.load()["running"] + engine.load()["waiting"] == 2)
    program.gate.set()
    assert first.wait().result.cached_tokens == 0
    assert other.wait().result.cached_tokens == 18 and other.tokens[0] == 8
    again = submit(engine, (*range(28), 7), max_tokens=9).wait()
    assert again.result.cached_tokens == 28 and again.tokens[0] == 8
    assert [copy for copy in program.copies if copy[2]] == [(0, 1, 18), (0, 0, 28)]
    assert engine.load()["prompt_tokens_reused"] == 46


def test_a_full_queue_refuses_with_the_limit(engine, program):
    program.gate.clear()
    answers = [submit(engine, max_tokens=2) for _ in range(4 + 3)]
    until(lambda: engine.load()["running"] + engine.load()["waiting"] == 7)
    with pytest.raises(Unavailable, match="3 requests wait for a slot .MAX_QUEUE."):
        for _ in range(5):
            answers.append(submit(engine, max_tokens=2))
    program.gate.set()
    assert all(answer.wait().error is None for answer in answers)


def test_cancelling_frees_the_slot_at_the_next_step(engine, program):
    program.hold_after = 5
    answer = submit(engine, (1,), max_tokens=50)
    until(lambda: not program.gate.is_set())
    answer.handle.cancel()
    program.gate.set()
    assert isinstance(answer.wait().error, Cancelled) and answer.result is None
    assert len(program.steps) <= 6
    until(lambda: engine.load()["running"] == 0)


def test_cancelling_in_the_queue_costs_no_step(program, readers):
    engine = Engine(program, readers)
    try:
        answer = submit(engine, adapter="a")
        until(lambda: engine.load()["waiting"] == 1)
        answer.handle.cancel()
        assert isinstance(answer.wait().error, Cancelled) and not program.steps
    finally:
        engine.stop()


def test_waiting_too_long_is_told_with_the_limit(program, readers):
    engine = Engine(program, readers, Limits(queue_timeout_s=0.05))
    try:
        error = submit(engine, adapter="never").wait().error
        assert isinstance(error, RequestTimeout) and "QUEUE_TIMEOUT_S" in str(error)
    finally:
        engine.stop()


def test_a_request_may_have_a_time_out_of_its_own(engine, program):
    waiting = submit(engine, adapter="never", timeout_s=0.05).wait()
    assert isinstance(waiting.error, RequestTimeout) and "in the queue" in str(waiting.error)
    program.gate.clear()
    running = submit(engine, (1,), max_tokens=60, timeout_s=0.2)
    time.sleep(0.3)
    program.gate.set()
    assert isinstance(running.wait().error, RequestTimeout)
    until(lambda: engine.load()["running"] == 0)


def test_a_request_that_waits_for_its_adapter_does_not_hold_the_others(engine, readers):
    slow = submit(engine, (1,), adapter="slow", max_tokens=2)
    assert submit(engine, (5,), max_tokens=2).wait().tokens == [6, 7]
    assert not slow.over.is_set()
    readers.arrive("slow")
    assert slow.wait().tokens == [2, 3]


def test_an_adapter_is_on_its_way_before_the_step_under_way_ends_if_a_slot_is_free_for_it(engine, program, readers):
    program.hold_after = 1
    answers = [submit(engine, (5,), max_tokens=30)]
    until(lambda: program.steps)
    time.sleep(0.05)  # it is in the next one now
    answers.append(submit(engine, (1,), adapter="a", max_tokens=1))
    assert list(readers.futures) == ["a"]
    answers += [submit(engine, (1,), max_tokens=30) for _ in range(2)]
    late = submit(engine, (1,), adapter="b", max_tokens=1)
    assert list(readers.futures) == ["a"]
    readers.arrive("a", "b")
    program.gate.set()
    assert all(answer.wait().error is None for answer in [*answers, late])


def test_rows_run_with_the_bank_slot_of_their_adapter(engine, program, readers):
    readers.arrive("a", "b")
    for key in "ab":
        submit(engine, adapter=key, max_tokens=1).wait()
    program.gate.clear()
    answers = [submit(engine, (at,), adapter=key, max_tokens=30) for at, key in ((10, "a"), (20, None), (30, "b"))]
    program.gate.set()
    assert all(answer.wait().error is None for answer in answers)
    assert sorted(program.placed) == [0, 1]
    together = [adapters for shape, slots, adapters in program.steps if len(slots) == 3]
    assert together and all(sorted(adapters) == [-1, 0, 1] for adapters in together)


def test_adapters_take_turns_when_there_are_more_than_bank_slots(engine, program, readers):
    readers.arrive(*"abcde")
    for key in "abcdeabcde":
        assert submit(engine, (1,), adapter=key, max_tokens=2).wait().tokens == [2, 3]
    assert engine.load()["adapters_resident"] == 2 and len(program.placed) == 10


def test_an_adapter_in_use_is_not_evicted(engine, program, readers):
    readers.arrive("a", "b", "c")
    program.gate.clear()
    first, second = submit(engine, (1,), adapter="a", max_tokens=30), submit(engine, (1,), adapter="b", max_tokens=30)
    program.gate.set()
    until(lambda: first.tokens and second.tokens)
    third = submit(engine, (1,), adapter="c", max_tokens=2).wait()
    assert third.error is None and first.wait().error is None and second.wait().error is None
    assert first.tokens == list(range(2, 32))


def test_adapters_that_nobody_waits_for_any_more_keep_no_other_away(engine, readers):
    for key in "abcd":
        answer = submit(engine, adapter=key)
        until(lambda: key in readers.futures)
        answer.handle.cancel()
        assert isinstance(answer.wait().error, Cancelled)
    readers.arrive("a", "b", "d")
    readers("c").set_exception(OSError("gone"))
    readers.arrive("e")
    assert submit(engine, (1,), adapter="e", max_tokens=1).wait().tokens == [2]
    assert submit(engine, (1,), adapter="a", max_tokens=1).wait().tokens == [2]


def test_an_adapter_that_is_asked_for_again_on_its_way_is_placed(program, readers):
    waited = []
    engine = Engine(program, readers, placed=waited.append)
    try:
        first = submit(engine, adapter="a")
        until(lambda: "a" in readers.futures)
        first.handle.cancel()
        first.wait()
        time.sleep(0.1)  # which does not count
        begun = time.monotonic()
        again = submit(engine, (1,), adapter="a", max_tokens=1)
        until(lambda: engine.load()["waiting"] == 1)
        readers.arrive("a")
        assert again.wait().tokens == [2] and len(readers.futures) == 1
        assert len(waited) == 1 and waited[0] <= time.monotonic() - begun
    finally:
        engine.stop()


def test_who_asks_for_an_adapter_while_it_is_being_placed_starts_no_second_load(program, readers):
    placing, go_on = threading.Event(), threading.Event()

    def put_adapter(slot, vector, rank):
        placing.set()
        assert go_on.wait(10)

    program.put_adapter = put_adapter
    engine = Engine(program, readers, Limits(queue_timeout_s=30))
    try:
        readers.arrive(*"abcde")
        for key in "abcd":  # as many as may be on their way at a time
            placing.clear()
            go_on.clear()
            first = submit(engine, adapter=key, max_tokens=1)
            assert placing.wait(10)
            second = submit(engine, adapter=key, max_tokens=1)
            go_on.set()
            assert first.wait().error is None and second.wait().error is None
        assert submit(engine, (1,), adapter="e", max_tokens=1, timeout_s=5).wait().tokens == [2]
        assert engine.load()["adapters_placed"] == 5 and engine.load()["adapters_evicted"] == 3
    finally:
        go_on.set()
        engine.stop()


def test_an_adapter_that_cannot_be_read_fails_its_request_alone(engine, readers):
    readers("bad").set_exception(OSError("gone"))
    other = submit(engine, (5,), max_tokens=30)
    failed = submit(engine, adapter="bad").wait()
    assert isinstance(failed.error, EngineError) and "gone" in str(failed.error)
    assert other.wait().error is None
    del readers.futures["bad"]
    readers.arrive("bad")
    assert submit(engine, (1,), adapter="bad", max_tokens=1).wait().tokens == [2]


def test_logits_that_are_not_finite_fail_their_row_alone(engine, program):
    other = submit(engine, (5,), max_tokens=30)
    broken = submit(engine, (664,), max_tokens=30).wait()
    assert isinstance(broken.error, EngineError) and "not finite" in str(broken.error)
    assert program.cleared == [1]
    assert other.wait().tokens == list(range(6, 36))


def test_min_tokens_bans_the_stop_tokens_until_then(engine, program):
    bans = []
    run = program.run
    program.run = lambda batch: (bans.append({int(id) for id in batch.sampler.banned[0] if id != VOCAB}), run(batch))[1]
    submit(engine, (1,), max_tokens=4, min_tokens=2, stop_token_ids=(9,)).wait()
    assert bans == [{9}, {9}, set(), set()]


def test_a_bad_word_bans_its_last_token_where_the_rest_has_come(engine, program):
    bans = []
    run = program.run
    program.run = lambda batch: (bans.append({int(id) for id in batch.sampler.banned[0] if id != VOCAB}), run(batch))[1]
    submit(engine, (1, 2), max_tokens=4, bad_words=((77,), (2, 3, 50), (4, 5, 60))).wait()
    assert bans == [{77}, {77, 50}, {77}, {77, 60}]


def test_an_exception_in_a_step_leaves_nobody_waiting(engine, program):
    program.gate.clear()
    answers = [submit(engine) for _ in range(6)]
    program.broken = RuntimeError("the device is gone")
    program.gate.set()
    assert all("the device is gone" in str(answer.wait().error) for answer in answers)
    until(lambda: not engine.healthy)
    with pytest.raises(Unavailable, match="the device is gone"):
        submit(engine)


def test_a_sink_that_raises_ends_its_own_request_alone(engine):
    class Raising(Answer):
        def token(self, token):
            raise ValueError("no")

    other = submit(engine, (5,), max_tokens=20)
    assert "could not be delivered" in str(submit(engine, sink=Raising()).wait().error)
    assert other.wait().tokens == list(range(6, 26))


def test_stopping_fails_what_is_left(program, readers):
    engine = Engine(program, readers)
    program.gate.clear()
    answers = [submit(engine, max_tokens=60) for _ in range(6)]
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    until(lambda: engine._closing.is_over(lambda: False))
    program.gate.set()
    stopper.join(10)
    assert all(isinstance(answer.wait().error, Unavailable) for answer in answers)
    with pytest.raises(Unavailable, match="shutting down"):
        submit(engine)


def test_with_a_grace_what_was_accepted_finishes_and_nothing_more_is_taken(program, readers):
    engine = Engine(program, readers)
    program.gate.clear()
    answers = [submit(engine, (at,), max_tokens=20) for at in range(6)]
    stopper = threading.Thread(target=engine.stop, args=(30,))
    stopper.start()
    until(lambda: engine._closing.is_over(lambda: True))
    with pytest.raises(Unavailable, match="shutting down"):
        submit(engine)
    program.gate.set()
    stopper.join(10)
    assert not stopper.is_alive() and [len(answer.wait().tokens) for answer in answers] == [20] * 6


def test_after_the_grace_what_is_left_is_told_so(program, readers):
    engine = Engine(program, readers)
    waiting = submit(engine, adapter="never")
    engine.stop(0.05)
    assert isinstance(waiting.wait().error, Unavailable)
    assert "its grace period of 0.05 s (GRACE_S) is over" in str(waiting.error) and waiting.error.reason == "shutting_down"
