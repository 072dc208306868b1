"""What the launcher finds out before it starts a server, and what it makes of a log. Starts none."""

import dataclasses
import fcntl
import json
import pathlib
import socket
import stat
import sys
import types

import numpy as np
import pytest

from jaxlora.errors import AdapterNotFound, InvalidRequest, SetupError
from jaxlora.settings import Settings
from server import backend, installation, preflight
from server.launch import TritonServer, failed_load


@pytest.fixture
def settings(tmp_path) -> Settings:
    ports = dict(zip(preflight.PORTS, preflight.free_ports(3), strict=True))
    return dataclasses.replace(Settings(), cache_dir=tmp_path, **ports)


class TestPreflight:
    def test_free_ports_are_no_problem(self, settings):
        assert preflight.port_problems(settings) == []

    def test_a_taken_port_is_told_with_its_variable(self, settings):
        with socket.create_server((settings.host, settings.grpc_port)):
            (problem,) = preflight.port_problems(settings)
        assert problem.startswith(f"GRPC_PORT: can't listen on 127.0.0.1:{settings.grpc_port} (Address already in use)")

    def test_two_settings_with_one_port_are_told(self, settings):
        (problem,) = preflight.port_problems(dataclasses.replace(settings, metrics_port=settings.http_port))
        assert problem.startswith(f"METRICS_PORT: {settings.http_port} is the HTTP_PORT too")

    def test_a_host_that_is_not_this_machine_is_told(self, settings):
        problems = preflight.port_problems(dataclasses.replace(settings, host="192.0.2.1"))
        assert problems and all("192.0.2.1" in problem for problem in problems)

    @pytest.mark.parametrize("host", ["no.such.host.invalid", "::1", "x" * 64])
    def test_a_host_without_an_ipv4_address_is_told(self, settings, host):
        with pytest.raises(SetupError, match=f"^HOST: '{host}' is no IPv4 address"):
            preflight.with_address(dataclasses.replace(settings, host=host))

    @pytest.mark.parametrize(("host", "address"), [("localhost", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), ("0.0.0.0", "0.0.0.0")])
    def test_a_host_becomes_an_address(self, settings, host, address):
        assert preflight.with_address(dataclasses.replace(settings, host=host)) == dataclasses.replace(settings, host=address)

    def test_folders_that_no_model_can_start_from_are_told(self, settings, tmp_path):
        assert preflight.path_problems(settings) == []
        for name in ("a b", "prüf", "a'b", "$HOME", "a;b"):
            (problem,) = preflight.path_problems(dataclasses.replace(settings, cache_dir=tmp_path / name))
            assert problem.startswith("CACHE_DIR: ") and name in problem.replace('"', "'")
        (problem,) = preflight.path_problems(dataclasses.replace(settings, model="/models/größe"))
        assert problem.startswith("MODEL: '/models/größe' holds letters")

    def test_free_ports_differ(self):
        assert len(set(preflight.free_ports(20))) == 20

    def test_a_cache_folder_that_cannot_be_made_is_told(self, tmp_path):
        (tmp_path / "file").write_text("")
        assert preflight.cache_problems(tmp_path / "new") == []
        (problem,) = preflight.cache_problems(tmp_path / "file" / "below")
        assert problem.startswith("CACHE_DIR: can't make")

    def test_memory_that_does_not_suffice_is_told_with_its_parts_and_settings(self):
        estimate = {"weights": 3 << 30, "KV cache": 5 << 30}
        assert preflight.memory_problems(estimate, 8 << 30, "this machine") == []
        assert preflight.memory_problems(estimate, None, "this machine") == []
        (problem,) = preflight.memory_problems(estimate, 7 << 30, "this machine")
        assert "8.00 GiB are needed (KV cache 5.00 GiB, weights 3.00 GiB), and this machine has 7.00 GiB free" in problem
        assert "MAX_SLOTS" in problem and "DTYPE" not in problem
        (problem,) = preflight.memory_problems(estimate, 7 << 30, "this machine", counted_as_float32=True)
        assert problem.endswith("or set DTYPE=bfloat16 (DTYPE=auto is counted as float32)")

    def test_the_memory_of_this_machine_is_known(self):
        free, where = preflight.device_memory()
        assert where and free is not None and 1 << 20 < free < 1 << 50

    def test_a_taken_port_is_told_before_the_model_is_looked_at(self, settings):
        with socket.create_server((settings.host, settings.http_port)), pytest.raises(SetupError, match="^HTTP_PORT"):
            preflight.check(dataclasses.replace(settings, model="no such model"))

    def test_an_unknown_model_is_told(self, settings):
        with pytest.raises(SetupError, match="^MODEL: there is no folder 'no such model'"):
            preflight.check(dataclasses.replace(settings, model="no such model"))


class TestInstallation:
    def test_a_server_on_path_is_taken_as_it_is(self, tmp_path):
        binary = tmp_path / "tritonserver"
        binary.write_text("")
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
        found = installation.find(tmp_path / "cache", {"PATH": str(tmp_path)})
        assert found == installation.Installation(binary, None, (), str(binary))

    @pytest.fixture
    def wheel(self, tmp_path, monkeypatch) -> pathlib.Path:
        """A `pytriton` package that has a stub for the running Python."""
        root = tmp_path / "site" / "pytriton" / "tritonserver"
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        for name in (
            "bin/tritonserver",
            "backends/python/libtriton_python.so",
            "backends/python/triton_python_backend_utils.py",
            f"python_backend_stubs/{python}/triton_python_backend_stub",
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
        spec = types.SimpleNamespace(submodule_search_locations=[str(root.parent)])
        monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(installation.importlib.metadata, "version", lambda name: "1.2")
        monkeypatch.setattr(installation, "_shared_libpython", lambda: tmp_path / "lib" / "libpython.so")
        return root

    def test_the_backend_of_the_wheel_gets_the_stub_of_the_running_python_beside_it(self, wheel, tmp_path):
        found = installation.find(tmp_path / "cache", {"PATH": ""})
        names = {path.name for path in (found.backend_directory / "python").iterdir()}
        assert names == {"libtriton_python.so", "triton_python_backend_utils.py", "triton_python_backend_stub"}
        assert found.library_path == (wheel.parent.parent / "nvidia_pytriton.libs", tmp_path / "lib")
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [found.backend_directory.name]
        assert installation.find(tmp_path / "cache", {"PATH": ""}) == found

    def test_a_start_that_broke_off_is_not_seen(self, wheel, tmp_path, monkeypatch):
        def breaks(source, target):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(installation.shutil, "copy", breaks)
            installation.find(tmp_path / "cache", {"PATH": ""})
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_python_without_a_stub_is_told_with_those_that_have_one(self, wheel, tmp_path):
        stubs = wheel / "python_backend_stubs"
        next(stubs.iterdir()).rename(stubs / "3.8")
        with pytest.raises(SetupError, match=r"no Python backend for Python 3\.\d+; it has 3\.8"):
            installation.find(tmp_path / "cache", {"PATH": ""})

    def test_no_server_at_all_is_told(self, tmp_path, monkeypatch):
        monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SetupError, match="no tritonserver on PATH"):
            installation.find(tmp_path, {"PATH": ""})

    def test_a_python_without_a_shared_library_is_told(self, monkeypatch):
        monkeypatch.setattr(installation.sysconfig, "get_config_var", {"INSTSONAME": "libpython3.99.a", "LIBDIR": "/nowhere"}.get)
        with pytest.raises(SetupError, match=r"has no shared library \(libpython3.99.a in /nowhere\)"):
            installation._shared_libpython()


class TestLog:
    def test_a_failed_load_is_told_without_the_traceback(self):
        line = (
            "E1124 09:59:13.327644 66 model_lifecycle.cc:642] \"failed to load 'adapters' version 1: Internal: TritonModelException: "
            'one\\ntwo\\n\\nAt:\\n  model.py(6): initialize\\n"'
        )
        assert failed_load(line) == "adapters: one\n  two"
        assert failed_load("I1124 09:59:13.327663 66 model_lifecycle.cc:777] \"failed to load 'adapters'\"") is None

    def test_only_the_newest_logs_are_kept_and_those_that_are_written(self, settings):
        logs = settings.cache_dir / "logs"
        logs.mkdir()
        for day in range(10, 30):
            (logs / f"triton-202001{day}-000000-1.log").write_text("")
        with (logs / "triton-20200112-000000-1.log").open() as written:
            fcntl.flock(written, fcntl.LOCK_SH)  # as a running server does
            server = TritonServer(settings)
        assert sorted(path.name for path in logs.iterdir()) == [f"triton-202001{day}-000000-1.log" for day in (12, *range(21, 30))]
        assert server.log_path.parent == logs and not server.log_path.exists()


class Tensor:
    def __init__(self, name: str, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class Request:
    def __init__(self, parameters: str = "", **arrays):
        self._parameters, self._arrays = parameters, arrays

    def inputs(self):
        return [Tensor(name, array) for name, array in self._arrays.items()]

    def parameters(self):
        return self._parameters


class TestBackend:
    def test_each_row_gets_its_values_and_fields_of_many_values_get_lists(self):
        request = Request(
            text_input=np.array([[b"a"], [b"b"]], object),
            stop_words=np.array([[b"x"], [b"y"]], object),
            temperature=np.array([[0.5], [1.0]], np.float32),
            input_ids=np.array([[1, 2], [3, -1]], np.int32),
        )
        assert backend.rows(request) == [
            {"text_input": b"a", "stop_words": [b"x"], "temperature": 0.5, "input_ids": [1, 2]},
            {"text_input": b"b", "stop_words": [b"y"], "temperature": 1.0, "input_ids": [3, -1]},
        ]

    def test_an_empty_list_stays_one(self):
        assert backend.rows(Request(input_ids=np.zeros((1, 0), np.int32))) == [{"input_ids": []}]

    def test_parameters_may_be_absent(self):
        assert backend.parameters(Request()) == {}
        assert backend.parameters(Request('{"seed": 3, "lora_name": "a/b"}')) == {"seed": 3, "lora_name": "a/b"}

    def test_settings_of_a_model_come_from_its_config_and_the_environment_wins(self, monkeypatch):
        args = {"model_config": json.dumps({"parameters": {"max_slots": {"string_value": "3"}, "max_queue": {"string_value": "7"}}})}
        monkeypatch.setenv("MAX_QUEUE", "8")
        monkeypatch.delenv("MAX_SLOTS", raising=False)
        found = backend.settings(args)
        assert (found.max_slots, found.max_queue) == (3, 8)

    def test_the_base_model_is_where_the_launcher_found_it_as_long_as_it_is_there(self, settings, tmp_path, monkeypatch):
        server = TritonServer(dataclasses.replace(settings, model="no/such model"), base_folder=tmp_path / "base")
        found = installation.Installation(pathlib.Path(sys.executable), None, (), "here")
        monkeypatch.setenv(backend.BASE_FOLDER, server._environment(found)[backend.BASE_FOLDER])
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text("{}")
        assert backend.base_folder(server.settings) == tmp_path / "base"
        (tmp_path / "base" / "config.json").unlink()
        with pytest.raises(SetupError, match="MODEL: there is no folder 'no/such model'"):
            backend.base_folder(server.settings)
        assert not TritonServer(settings)._environment(found)[backend.BASE_FOLDER]

    @pytest.fixture
    def pb_utils(self, monkeypatch):
        """As much of Triton's module as errors need."""

        class TritonError(Exception):
            NOT_FOUND, INVALID_ARG, INTERNAL = "NOT_FOUND", "INVALID_ARG", "INTERNAL"

        module = types.SimpleNamespace(
            TritonError=TritonError, TritonModelException=RuntimeError, InferenceResponse=lambda error: error.args
        )
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)

    @pytest.mark.usefixtures("pb_utils")
    def test_errors_keep_their_code_and_text_and_the_unexpected_keeps_its_text_to_the_log(self, capsys):
        assert backend.error_response(InvalidRequest({"seed": "is bad"})) == ("INVALID_ARG: seed: is bad", "INVALID_ARG")
        assert backend.error_response(AdapterNotFound("no such adapter")) == ("NOT_FOUND: no such adapter", "NOT_FOUND")
        text, code = backend.error_response(ValueError("/secret/path"))
        assert (code, "secret" in text) == ("INTERNAL", False) and "ValueError" in text
        assert "/secret/path" in capsys.readouterr().err

    @pytest.mark.usefixtures("pb_utils")
    @pytest.mark.parametrize(("error", "text"), [(SetupError("one\ntwo"), "one\ntwo"), (ValueError("/secret"), "internal error")])
    def test_a_failing_load_tells_the_reason_and_no_path(self, error, text, capsys):
        @backend.refusing
        def initialize(self, args):
            raise error

        with pytest.raises(RuntimeError, match=text) as raised:
            initialize(None, {})
        files = [frame.frame.code.path for frame in raised.traceback]
        assert "secret" not in str(raised.value) and str(files[-1]) == "model.py"
        capsys.readouterr()

    @pytest.mark.usefixtures("pb_utils")
    def test_a_load_that_succeeds_is_left_alone(self):
        loaded = []
        backend.refusing(lambda self, args: loaded.append(args))(None, {"a": "b"})
        assert loaded == [{"a": "b"}]
