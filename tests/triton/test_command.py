"""`python -m server` as a person runs it: what it prints works when typed, Ctrl-C ends it and everything it started."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

import pytest

from client import Client
from server import preflight, repository

from .conftest import SETTINGS
from .harness import CACHE, processes


@pytest.fixture
def environment(tiny_model) -> dict[str, str]:
    """The settings of a small server on free ports, as variables."""
    ports = dict(zip(preflight.PORTS, preflight.free_ports(3), strict=True))
    settings = SETTINGS | ports | {"model": tiny_model, "cache_dir": CACHE}
    return {**os.environ, **{name.upper(): str(value) for name, value in settings.items()}}


def start(environment: Mapping[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "server"],
        cwd=repository.PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def command(environment):
    """A started server and all that it printed until it was ready. Its HOST is a name, and a proxy is set that nobody needs."""
    process = start(environment | {"HOST": "localhost", "http_proxy": "http://127.0.0.1:1"})
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("Ctrl-C"):
            break
    yield process, "".join(printed)
    process.kill()
    process.communicate()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_printed_commands_work_and_a_signal_ends_everything(command, sent):
    process, printed = command
    assert re.search(r"^ready after \d+ s$", printed, re.M), printed
    for loaded in repository.MODELS:
        assert f"loaded {loaded}\n" in printed
    typed = re.findall(r"^  (\S.*)$", printed, re.M)
    assert [line.split()[0].rpartition("/")[2] for line in typed] == ["curl", "python", "python"]
    for line in typed:
        answer = subprocess.run(line, shell=True, cwd=repository.PROJECT, capture_output=True, timeout=60, check=False)
        assert answer.returncode == 0, (line, answer.stderr)
        if line.startswith("curl"):
            assert answer.stdout.count(b"data: ") > 1 and b'"finish_reason":"length"' in answer.stdout
    (server,) = processes(parent=process.pid)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "stopped\n", "")
    assert processes(group=server) == {}


def test_a_server_that_dies_is_told_and_is_a_failure(command):
    process, _ = command
    (server,) = processes(parent=process.pid)
    os.kill(server, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("error: the server ended with signal SIGKILL")
    assert processes(group=server) == {}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"MAX_SLOTS": "many", "DTYPE": "int8"}, ["error: DTYPE: 'int8' is none of auto, float32, bfloat16", "error: MAX_SLOTS: 'many' is not a whole number"]),
        ({"HTTP_PORT": "70000"}, ["error: HTTP_PORT: 70000 is not between 1 and 65535"]),
        ({"MODEL": "no such model"}, ["error: MODEL: there is no folder 'no such model'"]),
        ({"MAX_SEQ_LEN": "20000"}, ["error: MAX_SEQ_LEN: 20000 is over the 16384 positions of the base model"]),
        ({"MAX_SLOTS": "1024", "MAX_SEQ_LEN": "4096", "LORA_SLOTS": "4096", "MAX_LORA_RANK": "1024"}, ["error: MAX_SLOTS, MAX_SEQ_LEN"]),
    ],
)
def test_a_wrong_setting_is_one_line_before_anything_is_loaded(environment, wrong, told):
    process = start(environment | wrong)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.terminate()
    lines = sorted(err.splitlines())
    assert len(lines) == len(told) and all(line.startswith(start) for line, start in zip(lines, told, strict=True)), err
    assert "load" not in out


def test_a_log_goes_on_when_nobody_reads_what_is_printed(command, environment):
    process, printed = command
    log = pathlib.Path(re.search(r"^log +(.+)$", printed, re.M)[1])
    process.stdout.close()
    store = pathlib.Path(re.search(r"^adapters +(.+)$", printed, re.M)[1])
    with Client(f"127.0.0.1:{environment['GRPC_PORT']}") as client:
        for _ in range(2):
            os.utime(store)
            client.load_adapters()  # of which a line is printed
            client.generate("a", max_tokens=5)
    deadline = time.monotonic() + 10
    while log.read_text().count("successfully loaded 'adapters'") < 3 or log.read_text().count("finished") < 2:
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def test_a_taken_port_is_one_line(environment):
    with socket.create_server(("127.0.0.1", int(environment["GRPC_PORT"]))):
        out, err = start(environment).communicate(timeout=60)
    assert err.startswith(f"error: GRPC_PORT: can't listen on 127.0.0.1:{environment['GRPC_PORT']}") and len(err.splitlines()) == 1
    assert out == ""
