"""What becomes of the others when something goes wrong for one request: a small real model in the real engine, on every backend of this machine."""

import re
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from jaxlora import peft, weights
from jaxlora.config import ModelConfig
from jaxlora.engine import Engine, Program, Request, SamplingParams, Sizes
from jaxlora.engine.breakers import State
from jaxlora.engine.faults import FaultyProgram
from jaxlora.engine.health import Health, Thresholds
from jaxlora.engine.stepper import is_out_of_memory
from jaxlora.errors import EngineError, ServingError, Unavailable
from jaxlora.faults import parse
from tests.parity import checkpoints
from tests.parity.serving import Answer

CULPRIT = 7
NAMES = list(checkpoints.ADAPTERS)[:3]
SIZES = Sizes(slots=4, max_seq_len=128, prefill_chunk=16, lora_slots=2, max_lora_rank=16, decode_steps=3)


@pytest.fixture(scope="module")
def program(backend, tmp_path_factory) -> Program:
    folder = checkpoints.write_checkpoint(tmp_path_factory.mktemp("faults") / "base", "llama")
    config = ModelConfig.from_folder(folder)
    program = Program(config, weights.load(folder, config, "float32", packing=backend.packing), backend, SIZES)
    program.warm_up()
    return program


@pytest.fixture(scope="module")
def adapters(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    limits = peft.Limits(max_rank=16, max_file_bytes=1 << 20)
    read = {name: peft.read(checkpoints.write_adapter(folder / name, "llama", name), program.config, limits) for name in NAMES}
    overflowing = checkpoints.write_adapter(folder / "overflowing", "llama", NAMES[0])
    found = peft.read(overflowing, program.config, limits)
    modules = {path: pair.__class__(np.full_like(pair.a, 1e38), np.full_like(pair.b, 1e38), pair.scale) for path, pair in found.modules.items()}
    return read | {"overflowing": type("Adapter", (), {"modules": modules, "rank": found.rank})}


@pytest.fixture
def start(program, adapters):
    """Makes an engine with faults; it is stopped at the end."""
    started = []

    def read(name):
        found = Future()
        found.set_result(adapters[name])
        return found

    def make(faults="", **arguments):
        program.reset()
        engine = Engine(FaultyProgram(program, parse(faults)), read, **arguments)
        started.append(engine)
        return engine

    yield make
    for engine in started:
        engine.stop()


def asked(engine, seed, adapter=None, length=12, max_tokens=20):
    answer = Answer()
    prompt = tuple(int(token) for token in np.random.default_rng(seed).integers(0, checkpoints.VOCABULARY, length))
    params = SamplingParams(max_tokens=max_tokens, temperature=0.9, frequency_penalty=0.3, seed=seed)
    engine.submit(Request(prompt, params, answer, adapter))
    return answer


def others(engine):
    """Requests for several adapters, more than there are slots, and prompts of one chunk and of two."""
    return [asked(engine, seed, adapter, 12 + 2 * seed) for seed, adapter in enumerate([None, *NAMES, None, NAMES[0]])]


def ids(sinks):
    return [[token.id for token in sink.tokens()] for sink in sinks]


@pytest.fixture(scope="module")
def expected(program, adapters):
    def read(name):
        found = Future()
        found.set_result(adapters[name])
        return found

    program.reset()
    engine = Engine(program, read)
    try:
        return [ids([sink])[0] for sink in others(engine)], ids([asked(engine, CULPRIT, NAMES[1])])[0]
    finally:
        engine.stop()


def faults(engine):
    return {what for what, count in engine.health.faults().items() if count}


def error_of(sink) -> ServingError:
    with pytest.raises(ServingError) as error:
        sink.tokens()
    return error.value


@pytest.mark.parametrize(
    ("fault", "kind", "told", "counted"),
    [
        ("prefill:exception", EngineError, r"the prefill step failed for this request: \w+RuntimeError: INTERNAL", {("prefill", "exception")}),
        ("decode:exception", EngineError, r"the decode step failed for this request: \w+RuntimeError: INTERNAL", {("decode", "exception")}),
        ("prefill:out_of_memory", Unavailable, "no memory left for this request .prefill.*try again in 1 s", {("prefill", "out_of_memory")}),
        ("decode:out_of_memory", Unavailable, "no memory left for this request .decode.*try again in 1 s", {("decode", "out_of_memory")}),
        ("prefill:not_finite", EngineError, "logits are not finite", {("prefill", "not_finite")}),
        ("decode:not_finite", EngineError, "logits are not finite", {("decode", "not_finite")}),
        ("prefill:state_lost", EngineError, "the prefill step failed", {("prefill", "exception"), ("prefill", "state_lost")}),
        ("decode:state_lost", EngineError, "the decode step failed", {("decode", "exception"), ("decode", "state_lost")}),
    ],
)
def test_a_fault_ends_its_own_request_and_the_others_answer_as_ever(start, expected, fault, kind, told, counted):
    engine = start(f"{fault}:seed={CULPRIT}", health=Health(Thresholds(memory_grow_s=0.1), SIZES.slots))
    first, failing, rest = asked(engine, 0, max_tokens=20), asked(engine, CULPRIT, NAMES[1]), others(engine)
    error = error_of(failing)
    assert isinstance(error, kind) and re.search(told, str(error)), error
    assert ids(rest) == expected[0]
    assert len(first.tokens()) == 20
    # A step that read prompts beside answers was tried again in its parts.
    assert {(place, what) for place, what in faults(engine) if place != "mixed"} == counted
    assert {("mixed", what) for _, what in counted} >= {(place, what) for place, what in faults(engine) if place == "mixed"}
    assert engine.load()["running"] == engine.load()["waiting"] == 0
    assert ids(others(engine)) == expected[0], "every slot and every adapter's slot is free again"


@pytest.mark.parametrize(
    "fault",
    ["prefill:exception", "decode:exception", "decode:out_of_memory", "decode:state_lost", "adapter:out_of_memory", "decode:slow"],
)
def test_a_fault_that_passes_costs_nobody_an_answer(start, expected, fault):
    engine = start(f"{fault}:times=1")
    assert ids(others(engine)) == expected[0]
    assert fault == "decode:slow" or faults(engine)


def test_fewer_rows_run_where_more_find_no_memory(start, expected):
    freed = []
    engine = start("decode:out_of_memory:rows=2", relieve=lambda: freed.append(1))
    assert ids(others(engine)) == expected[0]
    assert engine.health.allowed_rows() == 2 and engine.health.states()["memory"] is State.OPEN
    counts = engine.health.faults()
    assert counts["decode", "out_of_memory"] == 1 and counts["mixed", "out_of_memory"] <= 1
    assert len(freed) == sum(counts.values()) and faults(engine) <= {("decode", "out_of_memory"), ("mixed", "out_of_memory")}


def test_prompts_are_read_one_by_one_where_there_is_no_memory_for_several(start, expected, program):
    engine = start("prefill:out_of_memory:rows=1", health=Health(Thresholds(memory_grow_s=1000), SIZES.slots))
    with engine._wakeup:  # so that all are there when the first one is read
        sinks = others(engine)
    assert ids(sinks) == expected[0]
    assert faults(engine) == ({("mixed", "out_of_memory")} if program.prefill_rows > 1 else set())
    assert engine.health.allowed_rows() == SIZES.slots


def test_an_adapter_that_cannot_be_placed_fails_its_request_alone(start, expected):
    engine = start("adapter:exception:times=1")
    assert "the adapter step failed" in str(error_of(asked(engine, CULPRIT, NAMES[1])))
    assert ids(others(engine)) == expected[0] and ids([asked(engine, CULPRIT, NAMES[1])]) == [expected[1]]


def test_a_device_that_is_broken_ends_the_engine_and_everyone_is_told(start):
    told = []
    engine = start(f"decode:broken:seed={CULPRIT}", stopped=told.append)
    with engine._wakeup:  # so that all are there before the first one fails
        sinks = [asked(engine, CULPRIT), *others(engine)]
    (error,) = {str(error_of(sink)) for sink in sinks}
    assert re.fullmatch(r"the engine stopped: \w+RuntimeError: INTERNAL: the device is broken \(FAULTS\)", error)
    with pytest.raises(Unavailable, match="the engine stopped"):
        asked(engine, 1)
    engine._thread.join()
    assert [str(error) for error in told] == [error]


def test_real_overflow_leaves_nothing_behind_in_its_slot_and_its_adapter_is_refused_after_a_while(start, expected):
    engine = start()
    for _ in range(3):
        assert "not finite" in str(error_of(asked(engine, CULPRIT, "overflowing", length=40)))
    with pytest.raises(Unavailable, match="not finite; try again in 30 s"):
        asked(engine, CULPRIT, "overflowing")
    assert engine.health.states()["adapter"] is State.OPEN
    assert ids(others(engine)) == expected[0]


def test_a_slow_step_opens_the_latency_breaker(start):
    engine = start("decode:slow:seconds=0.02", health=Health(Thresholds(token_s=0.01), SIZES.slots))
    assert len(asked(engine, 1).tokens()) == 20, "what was accepted is answered"
    with pytest.raises(Unavailable, match="time per output token is 0.0"):
        asked(engine, 2)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes."), True),
        (jax.errors.JaxRuntimeError("INTERNAL: Error preparing computation: Out of memory allocating 61944064 bytes."), True),
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_the_words_of_xla_for_memory_that_runs_out_are_known(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("text", ["decode", "decode:fire", "step:slow", "decode:slow:colour=3", "decode:slow:seed=x"])
def test_a_fault_that_is_not_written_as_it_should_be_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse(text)
