"""The benchmark's other parts: the talk with a driver, prompts, Zipf draws, the report."""

import argparse
import json
import math
import os
import sys

import numpy as np
import pytest

from bench import processes, report, session
from bench.__main__ import sampling
from bench.adapters import cache_of
from bench.drivers import System
from bench.drivers.peer_llama import answer_of
from bench.worker import Answer, DriverFailed, Request, Unsupported, Worker
from bench.workloads import MIXES, Prompts, Row, rows, zipf
from jaxlora.settings import Settings
from jaxlora.text import Tokenizer
from server.repository import PROJECT

DRIVER = """
import os, sys, time
from bench.worker import Answer, Unsupported, serve
class Driver:
    def start(self, setup):
        print("a library prints")
        self.setup = setup
        return {"versions": {"it": setup["version"]}}
    def run(self, requests, concurrency):
        if "turns" in self.setup:
            with open(self.setup["turns"], "a") as file:
                print(os.getpid(), *requests[0].prompt, requests[0].answer, file=file)
        if self.setup.get("refused") == requests[0].adapter:
            raise Unsupported("not with this adapter")
        return [Answer(0.0, [(1.0 + i / 100, 1) for i in range(request.answer)], request.answer, request.prompt) for request in requests]
    def refuse(self):
        raise Unsupported("it has no adapters")
    def fail(self):
        raise KeyError("what")
    def leave(self):
        sys.exit(3)
    def sleep(self):
        time.sleep(60)
    def stop(self):
        print("stopped")
serve(Driver())
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """The module of a driver that needs no model."""
    (tmp_path / "driver_for_test.py").write_text(DRIVER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(PROJECT)]))
    return "driver_for_test"


@pytest.fixture
def worker(tmp_path, driver):
    worker = Worker("test", sys.executable, driver, tmp_path / "log", PROJECT)
    yield worker
    worker.stop()


def test_a_driver_answers_though_its_libraries_print(worker):
    assert worker.start({"version": "1"}) == {"versions": {"it": "1"}}
    assert worker.run([Request([4, 5], "a b", 2)], 1) == [Answer(0.0, [[1.0, 1], [1.01, 1]], 2, [4, 5])]


def test_a_driver_says_what_it_cannot_do_and_goes_on(worker):
    with pytest.raises(Unsupported, match="it has no adapters"):
        worker.call("refuse")
    with pytest.raises(DriverFailed, match="KeyError"):
        worker.call("fail")
    assert worker.start({"version": "2"})["versions"] == {"it": "2"}


def test_a_driver_that_ends_is_told_from_one_that_answers(worker):
    with pytest.raises(DriverFailed, match="ended"):
        worker.call("leave")


def test_a_driver_that_does_not_answer_in_time_is_ended(worker):
    with pytest.raises(DriverFailed, match="no answer to 'sleep'"):
        worker.call("sleep", timeout_s=1)
    with pytest.raises(DriverFailed, match="ended"):
        worker.call("start", setup={})


def test_a_driver_stops_what_it_started_when_it_is_stopped(worker):
    worker.start({"version": "1"})
    worker.stop()
    assert worker.log_path.read_text().endswith("stopped\n")


def test_processes_are_counted_with_their_descendants(worker):
    worker.start({"version": "1"})
    assert processes.tree(os.getpid()).count(worker.pid) == 1
    assert 1 << 20 < processes.memory_bytes(worker.pid) < 1 << 30
    assert processes.cpu_seconds(os.getpid()) >= processes.cpu_seconds(worker.pid) > 0


def test_tokens_of_llama_server_without_text_of_their_own_are_counted():
    response = lambda so_far, *tokens, stop=False: json.dumps({"tokens": tokens, "tokens_predicted": so_far, "stop": stop})
    whole = [(1.0, response(1, 5)), (2.0, response(2, 6)), (2.1, response(2, stop=True))]
    assert answer_of(0.5, whole) == Answer(0.5, [(1.0, 1), (2.0, 1)], 2, [5, 6])
    late = [(1.0, response(1, 5)), (3.0, response(3, 7)), (4.0, response(4, stop=True))]
    assert answer_of(0.5, late) == Answer(0.5, [(1.0, 1), (3.0, 2), (4.0, 1)], 4, [])
    with pytest.raises(RuntimeError, match="no slot"):
        answer_of(0.5, [(1.0, json.dumps({"error": "no slot"}))])


def test_no_row_has_a_prompt_of_another(default_model):
    prompts = Prompts(Tokenizer.from_folder(default_model))
    asked = [Row(16, answer, 2, mix) for answer in (1, 8) for mix in MIXES]
    requests = [request for row in asked for repetition in range(2) for request in prompts.requests(row, ["a", "b"], repetition)]
    assert len({request.text for request in requests}) == len(requests) == 24


def test_each_base_model_has_adapters_and_files_of_its_own(tmp_path):
    settings, caches = Settings(cache_dir=tmp_path), set()
    for parent, weights in (("one", b"1"), ("other", b"1"), ("other", b"22")):
        folder = tmp_path / parent / "model"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
        caches.add(cache_of(settings, folder))
        assert cache_of(settings, folder) in caches
    assert len(caches) == 3


@pytest.fixture
def systems(driver, monkeypatch):
    """Two systems that are there, and one that is not."""
    there = {name: System(name, driver, sys.executable, sys.executable, name == "engine", "") for name in ("engine", "peft")}
    monkeypatch.setattr(session, "DRIVERS", {**there, "vllm": System("vLLM", driver, "no/python", "no/python", False, "")})
    return ["engine", "peft", "vllm"]


def test_systems_take_turns_on_the_same_prompts_after_a_short_one_each(tmp_path, systems, default_model):
    setup, row = {"version": "1", "turns": str(tmp_path / "turns")}, Row(16, 20, 2, "mixed")
    prompts = Prompts(Tokenizer.from_folder(default_model))
    with session.Session(setup, {}, tmp_path, lambda line: None).systems(systems) as running:
        pids = [running.running[name].worker.pid for name in ("engine", "peft")]
        found = running.row(row, prompts, ["a", "b"], 2)["systems"]
        assert running.describe()["vllm"] == {"missing": "not installed (`make bench-peers`)"}
    turns = [list(map(int, line.split())) for line in (tmp_path / "turns").read_text().splitlines()]
    assert [turn[0] for turn in turns] == pids * 3
    assert [turn[-1] for turn in turns] == [session.WARM_UP_TOKENS] * 2 + [20] * 4
    assert all(one[1:] == other[1:] for one, other in zip(turns[::2], turns[1::2]))
    assert found["engine"]["decode"]["median"] == pytest.approx(200) and found["engine"]["repetitions"] == 2
    assert found["engine"]["agreement"] == {"with": "peft", "share": 1.0}


def test_what_a_system_refuses_is_noted_and_the_others_go_on(tmp_path, systems, default_model):
    setup = {"version": "1", "refused": "a"}
    with session.Session(setup, {}, tmp_path, lambda line: None).systems(["engine"]) as running:
        prompts = Prompts(Tokenizer.from_folder(default_model))
        assert running.row(Row(16, 20, 2, "one"), prompts, ["a"], 1)["systems"] == {"engine": {"cannot": "not with this adapter"}}
        assert "decode" in running.row(Row(16, 20, 2, "base"), prompts, ["a"], 1)["systems"]["engine"]


def test_an_answer_of_another_length_is_a_failure(tmp_path, systems):
    with session.Session({"version": "1"}, {}, tmp_path, lambda line: None).systems(["engine"]) as running:
        running.running["engine"].worker.run = lambda requests, concurrency: [Answer(0.0, [(1.0, 1)], 1, [3])]
        with pytest.raises(DriverFailed, match="answers of"):
            running.turn("engine", [Request([1], "a", 2)], 1)


def test_prompts_have_their_length_as_text_and_as_ids_and_never_come_twice(default_model):
    tokenizer = Tokenizer.from_folder(default_model)
    prompts = Prompts(tokenizer)
    requests = [request for repetition in range(3) for request in prompts.requests(Row(64, 8, 16, "mixed"), ["a", "b"], repetition)]
    assert all(len(request.prompt) == 64 and tokenizer.encode(request.text) == request.prompt for request in requests)
    assert len({tuple(request.prompt) for request in requests}) == len(requests)
    assert [request.adapter for request in requests[:4]] == ["a", "b", "a", "b"]
    assert prompts.make(64, 1, 2) == prompts.make(64, 1, 2)


def test_every_request_of_a_row_is_sampled_as_it_was_asked(default_model):
    given = sampling("temperature=0.8,top_k=40")
    assert given == {"temperature": 0.8, "top_k": 40, "top_p": 1.0, "min_p": 0.0}, "nothing is left to a system's own default"
    prompts = Prompts(Tokenizer.from_folder(default_model), given)
    assert [request.sampling for request in prompts.requests(Row(8, 4, 3, "base"), [], 0)] == [given] * 3
    with pytest.raises(argparse.ArgumentTypeError, match="'topk' is none of temperature"):
        sampling("topk=3")


def test_one_stream_does_not_mix_adapters():
    assert [str(row) for row in rows([(64, 8)], [1, 4], ["base", "mixed"])] == [
        "64/8, 1 stream, base model", "64/8, 4 streams, base model", "64/8, 4 streams, 16 adapters",
    ]  # fmt: skip


def test_zipf_draws_follow_the_law():
    drawn = zipf([str(index) for index in range(100)], 20_000, seed=1)
    counts = np.array([drawn.count(str(index)) for index in range(4)])
    assert counts / counts[0] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=0.15)
    assert zipf(["a"], 3, seed=1) == ["a", "a", "a"]


def spread(value):
    return {"median": value, "low": value, "high": value}


def numbers(decode, together=True):
    speeds = {name: spread(decode) for name in ("decode", "output", "prefill")}
    turns = [{"decode": decode, "output": decode, "prefill": decode}] * 3
    times = {"ttft_ms": {"mean": 1.0, "p95": 2.0}, "tpot_ms": {"p50": 3.0, "p99": 4.0}}
    return {**speeds, **times, "together": together, "turns": turns, "memory_bytes": 1 << 20, "elsewhere": 0.0}


RESULTS = {
    "when": "now", "command": "", "commit": "abc", "model": "m", "weights_per_token": 1_000_000,
    "machine": {"cpu": "CPU", "cores": 2, "features": ["avx2"], "memory_bytes": 1 << 30, "system": "Linux"},
    "limits": {"read_bytes_per_s": 4e8, "gemm": {"float32": {"numpy": 1e11}, "bfloat16": {}}},
    "precisions": {
        "float32": {
            "systems": {
                "engine": {"versions": {"jax": "1"}, "start_s": 2.0}, "llama": {"versions": {"llama.cpp": "2"}, "start_s": 1.0},
                "vllm": {"missing": "not installed"}, "peft": {"versions": {}, "start_s": 1.0},
            },
            "rows": [{**Row(64, 8, 4, "mixed").__dict__, "systems": {"engine": numbers(200.0), "llama": numbers(50.0, False), "peft": {"cannot": "no"}}}],
        }
    },
    "scenarios": {"x": {"title": "Something else", "columns": ["", "n"], "rows": [["one", 2]]}},
}  # fmt: skip


def test_the_report_shows_speeds_ratios_and_what_is_not_there(tmp_path):
    report.write(tmp_path, RESULTS)
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS
    text = (tmp_path / "results.md").read_text()
    assert "| 64/8, 4 streams, 16 adapters | 200 (200 to 200) | 50.0 (50.0 to 50.0) \\* |  | can't |" in text
    assert "| 64/8, 4 streams, 16 adapters | 4.00 (4.00 to 4.00) |  |  | 4.00 |" in text
    assert "vLLM: not installed" in text and "at most 100 tokens/s" in text and "| one | 2 |" in text
    assert "not to be relied on" not in text


def test_streams_that_never_generate_together_are_compared_by_whole_answers():
    found = json.loads(json.dumps(RESULTS))
    [row] = found["precisions"]["float32"]["rows"]
    for turn in row["systems"]["llama"]["turns"]:
        turn["output"] = 20.0
    assert report.ratios(row, "engine")["llama"].median == 10
    row["systems"]["llama"]["together"] = True
    assert report.ratios(row, "engine")["llama"].median == 4


def test_the_report_warns_of_a_busy_machine():
    busy = json.loads(json.dumps(RESULTS))
    busy["precisions"]["float32"]["rows"][0]["systems"]["engine"]["elsewhere"] = 0.3
    assert "up to 30%" in report.markdown(busy) and "not to be relied on" in report.markdown(busy)


def test_a_speed_that_was_not_measured_leaves_its_cell_empty():
    found = json.loads(json.dumps(RESULTS))
    found["precisions"]["float32"]["rows"][0]["systems"]["engine"]["decode"] = spread(math.nan)
    assert "nan" not in report.markdown(found)
