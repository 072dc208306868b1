"""Faults in a real server as a person runs it: what clients, metrics and log are told, that it comes back by itself, and that it stops in order."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import types
import urllib.error
import urllib.request

import pytest

from server import preflight, repository

from .conftest import SETTINGS
from .harness import CACHE, Grpc, Http, Refused, processes, text_of
from .test_launch import eventually
from .test_metrics import total, wait_for

EXCEPTION, NOT_FINITE, NO_MEMORY, BROKEN = 11, 12, 13, 14
FAULTS = (
    f"decode:exception:seed={EXCEPTION},decode:not_finite:seed={NOT_FINITE},"
    f"prefill:out_of_memory:seed={NO_MEMORY},decode:broken:seed={BROKEN}:rows=1"
)
SLOTS = 2
LONG = {"text_input": "x", "stream": True, "ignore_eos": True}


class Command:
    """`python -m server` with faults, and what it prints."""

    def __init__(self, model: pathlib.Path, folder: pathlib.Path, **settings):
        ports = dict(zip(preflight.PORTS, preflight.free_ports(3), strict=True))
        self.log = folder / "requests.jsonl"
        own = SETTINGS | ports | {"model": model, "cache_dir": CACHE, "request_log": self.log} | settings
        self.urls = types.SimpleNamespace(
            http_url=f"http://127.0.0.1:{ports['http_port']}",
            grpc_url=f"127.0.0.1:{ports['grpc_port']}",
            metrics_url=f"http://127.0.0.1:{ports['metrics_port']}/metrics",
        )
        self.http = Http(self.urls)
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server"], cwd=repository.PROJECT, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, **{name.upper(): str(value) for name, value in own.items()}},
        )  # fmt: skip
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self._reader.start()

    def wait_until_ready(self, times: int) -> None:
        assert eventually(lambda: sum(line.startswith("ready after") for line in self.lines) == times, 120), self.lines

    def is_ready(self, model: str = "jax_lora") -> bool:
        try:
            urllib.request.urlopen(f"{self.urls.http_url}/v2/models/{model}/ready", timeout=5).close()
        except OSError:
            return False
        return True

    def printed(self) -> str:
        """All that it printed until its end."""
        self._reader.join(30)
        return "".join(self.lines)

    def requests(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def command(tiny_model, tmp_path_factory):
    command = Command(tiny_model, tmp_path_factory.mktemp("faults"), faults=FAULTS, grace_s=3, max_slots=SLOTS)
    try:
        command.wait_until_ready(1)
        yield command
    finally:
        command.process.terminate()
        command.process.wait(30)


def in_background(call):
    """Runs a call and gives where its result, or the text of its refusal, will be."""
    results = []

    def run():
        try:
            results.append(call())
        except Refused as error:
            results.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


@pytest.mark.parametrize(
    ("seed", "reason", "told"),
    [
        (EXCEPTION, "exception", "INTERNAL: the decode step failed for this request: "),
        (NOT_FINITE, "not_finite", "INTERNAL: the model's logits are not finite"),
        (NO_MEMORY, "out_of_memory", "UNAVAILABLE: the device has no memory left for this request (prefill)"),
    ],
)
def test_a_fault_is_told_to_its_client_counted_and_logged_while_another_answer_goes_on(command, seed, reason, told):
    alone = text_of(command.http.stream(**LONG, max_tokens=300, seed=1))
    thread, results = in_background(lambda: text_of(command.http.stream(**LONG, max_tokens=300, seed=1)))
    with pytest.raises(Refused) as error:
        command.http.generate(text_input="x", max_tokens=4, seed=seed, id=reason)
    assert told in str(error.value)
    thread.join()
    assert results == [alone]
    place = "prefill" if seed == NO_MEMORY else "decode"
    wait_for(command.urls, lambda samples: total(samples, "lora_faults_total", place=place, kind=reason) >= 1)
    wait_for(command.urls, lambda samples: total(samples, "lora_requests_total", outcome="failed", reason=reason) == 1)
    wait_for(command.urls, lambda samples: total(samples, "lora_requests_running") == total(samples, "lora_slots_used") == 0)
    (line,) = [line for line in command.requests() if line["request_id"] == reason]
    assert (line["outcome"], line["reason"]) == ("failed", reason) and told.partition(": ")[2] in line["error"]


def test_an_engine_that_stops_fails_everyone_at_once_is_not_ready_and_is_started_again(command):
    running = command.http.stream(**LONG, max_tokens=15_000, seed=BROKEN)
    next(running)
    with pytest.raises(Refused, match="INTERNAL: the engine stopped: .*the device is broken"):
        Grpc(command.urls).generate(text_input="x", rows=5, max_tokens=15_000, parameters={"ignore_eos": True})
    with pytest.raises(Refused, match="INTERNAL: the engine stopped: .*the device is broken"):
        list(running)
    assert eventually(lambda: not command.is_ready())
    command.wait_until_ready(2)
    assert command.is_ready() and command.is_ready("llm")
    (line,) = [line for line in command.lines if "the engine stopped" in line]
    assert "the device is broken" in line and "starting again in 1 s\n" in command.lines
    assert command.http.generate(text_input="hi", max_tokens=3, ignore_eos=True)["num_output_tokens"] == 3
    wait_for(command.urls, lambda samples: total(samples, "lora_engine_restarts") == 1 and total(samples, "lora_engine_up") == 1)


def test_a_model_whose_process_dies_is_started_again(command):
    (server,) = processes(parent=command.process.pid)
    (stub,) = [pid for pid, line in processes(group=server).items() if "backend_stub" in line and "jax_lora" in line]
    os.kill(stub, signal.SIGKILL)
    command.wait_until_ready(3)
    assert any(line.startswith("the process of the model has ended") for line in command.lines)
    wait_for(command.urls, lambda samples: total(samples, "lora_engine_restarts") == 2)


def test_it_takes_no_more_when_it_is_told_to_stop_and_ends_what_takes_longer_than_the_grace(command):
    long = command.http.stream(**LONG, max_tokens=15_000)
    next(long)
    short = command.http.stream(**LONG, max_tokens=200)
    next(short)
    command.process.send_signal(signal.SIGTERM)

    def refused() -> bool:
        try:
            command.http.generate(text_input="x", max_tokens=1)
        except Refused as error:
            assert "UNAVAILABLE: the server is shutting down" in str(error)
            return True
        return False

    assert eventually(refused)
    assert list(short)[-1]["num_output_tokens"] == 200
    with pytest.raises(Refused, match=r"UNAVAILABLE: the server is shutting down, and its grace period of 3 s \(GRACE_S\) is over"):
        list(long)
    assert command.process.wait(30) == 0
    # The short one may have ended by then, and one of those that were to be refused may have come before.
    assert re.search("(1 request is|[23] requests are) being finished, for 3 s at most", command.printed())
    assert {line["reason"] for line in command.requests()[-4:]} >= {"shutting_down", "length"}
