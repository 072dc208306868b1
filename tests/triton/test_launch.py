"""The launcher with a real Triton: nothing survives it, and what it can't start it tells."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from server import preflight, repository
from server.launch import ServerDied

from .harness import Http, Refused, processes, serving

MODEL = """
import pathlib, time
class TritonPythonModel:
    def initialize(self, args):
        {initialize}
    def execute(self, requests):
        return []
"""
CONFIG = """
name: "{name}" backend: "python" max_batch_size: 1
input {{ name: "x" data_type: TYPE_INT32 dims: 1 }} output {{ name: "y" data_type: TYPE_INT32 dims: 1 }}
instance_group {{ kind: KIND_CPU }}
"""


def write_model(folder: pathlib.Path, name: str, initialize: str = "pass") -> None:
    model = folder / "model_repository" / name
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(CONFIG.format(name=name))
    (model / "1" / "model.py").write_text(MODEL.format(initialize=initialize))


def eventually(condition, timeout_s: float = 30) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def shared_memory(server) -> list[pathlib.Path]:
    """What this server has of it: others may run beside it."""
    return list(pathlib.Path("/dev/shm").glob(f"{server._shared_memory}*"))


def test_a_stopped_server_leaves_no_process_and_no_shared_memory(tmp_path):
    write_model(tmp_path, "one")
    with serving(tmp_path, models=("one",)) as server:
        group = server.pid
        assert any("triton_python_backend_stub" in process for process in processes(group=group).values())
        # A server is ready a moment before it listens for metrics.
        assert eventually(lambda: len(preflight.port_problems(server.settings)) == 3)
        assert shared_memory(server)
    assert processes(group=group) == {}
    assert not shared_memory(server)
    assert preflight.port_problems(server.settings) == []
    server.stop()  # a second time is nothing


def test_a_log_that_can_not_be_written_to_holds_nothing_up(tmp_path):
    more_than_a_pipe_holds = "for _ in range(100): print('x' * 10_000, flush=True)"
    write_model(tmp_path, "one", more_than_a_pipe_holds)
    (tmp_path / "triton.log").symlink_to("/dev/full")
    with serving(tmp_path, models=("one",), start_timeout_s=60) as server:
        assert server.is_ready()


def test_a_killed_server_leaves_no_process_and_no_shared_memory(tmp_path):
    write_model(tmp_path, "one")
    with serving(tmp_path, models=("one",)) as server:
        server.kill()
        assert processes(group=server.pid) == {}
        assert not shared_memory(server)


def test_a_server_that_dies_is_told_and_its_models_end_too(tmp_path):
    write_model(tmp_path, "one")
    with serving(tmp_path, models=("one",)) as server:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerDied, match="ended with signal SIGKILL(.|\n)*its whole log is"):
            server.wait()
        group = server.pid
    assert processes(group=group) == {}


def test_a_model_that_cannot_be_loaded_is_told_with_its_reason(tmp_path):
    write_model(tmp_path, "one", "raise ValueError('no such weights')")
    with pytest.raises(ServerDied, match=r"(?s)code 1\n  one: ValueError: no such weights\nits whole log"), serving(tmp_path, models=("one",)):
        pass


def test_a_start_that_takes_too_long_is_given_up(tmp_path):
    write_model(tmp_path, "one", "time.sleep(600)")
    with pytest.raises(TimeoutError, match="not ready after 1 s"), serving(tmp_path, models=("one",), start_timeout_s=1):
        pass


def test_the_models_see_the_settings_and_the_project(tmp_path):
    answer = tmp_path / "answer"
    seen = "repr([os.environ['MAX_QUEUE'], jaxlora.__file__])"
    write_model(tmp_path, "one", f"import os, jaxlora; pathlib.Path({str(answer)!r}).write_text({seen})")
    with serving(tmp_path, models=("one",), max_queue=77):
        pass
    assert answer.read_text() == repr(["77", str(repository.PROJECT / "jaxlora" / "__init__.py")])


def test_a_model_is_loaded_again_only_when_its_folder_has_changed(tmp_path):
    loads = tmp_path / "loads"
    write_model(tmp_path, "one", f"pathlib.Path({str(loads)!r}).open('a').write('x')")
    with serving(tmp_path, models=("one",)) as server:
        Http(server).load("one")
        assert loads.read_text() == "x"
        (tmp_path / "model_repository" / "one" / "new").write_text("")
        Http(server).load("one")
        assert loads.read_text() == "xx"


def test_a_load_that_failed_does_not_hold_up_the_stop(tmp_path):
    """Triton counts such a model as living, and would wait until EXIT_TIMEOUT_S have passed."""
    write_model(tmp_path, "one", f"assert not pathlib.Path({str(tmp_path / 'fail')!r}).exists()")
    with serving(tmp_path, models=("one",)) as server:
        for path in (tmp_path / "fail", tmp_path / "model_repository" / "one" / "new"):
            path.write_text("")
        with pytest.raises(Refused, match="AssertionError"):
            Http(server).load("one")
    assert "Exit timeout expired" not in server.log_path.read_text()


def test_the_server_ends_when_its_launcher_is_killed(tmp_path):
    write_model(tmp_path, "one")
    script = f"""
        import pathlib, sys
        from tests.triton.harness import serving
        with serving(pathlib.Path({str(tmp_path)!r}), models=("one",)) as server:
            print(server.pid, flush=True)
            sys.stdin.read()
    """
    launcher = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=repository.PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with launcher:
        group = int(launcher.stdout.readline())
        assert processes(group=group)
        launcher.kill()
    assert eventually(lambda: not processes(group=group)), processes(group=group)
