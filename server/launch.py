"""Runs one Triton server: starts it, tells when it is ready, and leaves no process behind.

The server and the processes of its Python models live in a session of their own, so a Ctrl-C in a terminal reaches only the launcher,
which stops them in order. All output of the server goes into a log file; `on_line` sees each line too.
"""

import contextlib
import fcntl
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping

from jaxlora import allocator
from jaxlora.settings import Settings
from server import access, installation, repository
from server.backend import BASE_FOLDER
from server.lifeline import Lifeline

EXIT_TIMEOUT_S = 10
"""How long the server may take to end once the answers in flight have had their GRACE_S."""

# When all processes of its models have ended, or one has crashed. Triton would wait for EXIT_TIMEOUT_S for a model that crashed, or whose
# last load failed.
_IDLE_EXIT_S = 1.5
# A first compilation of all programs, on a slow machine. Triton's own limit is 30 s.
_STUB_TIMEOUT_S = 3600
# Becomes another program, which is told to stop when the thread that started it ends: prctl(PR_SET_PDEATHSIG, SIGTERM).
_UNTIL_PARENT_ENDS = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):  # else it ended before the call
    os.execv(sys.argv[2], sys.argv[2:])
"""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
_FAILED_LOAD = re.compile(r"^E.*\"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)\"$")


class ServerDied(Exception):
    """The server ended by itself. `str()` tells why, as far as its log tells, and where the log is."""


class EngineStopped(Exception):
    """The server runs, but can't answer any more. `str()` tells why."""


class TritonServer:
    """A Triton server over a model repository, as a context manager.

    Arguments:
        settings: host, ports, cache folder, and all that the models read; handed on as environment variables.
        model_repository: folder of the models; the adapter store lies inside it.
        models: names of the models to load at start.
        log_path: file for the server's output; default: a new one in `<cache_dir>/logs`.
        environ: the environment to start from.
        on_line: called with every line of output, from a thread of its own.
        arguments: further arguments for `tritonserver`.
        restarts: how many servers before this one had to be replaced, for its metrics.
        base_folder: the base model's folder, where it is known; else each model looks for it.

    `start` must be called from a thread that lives as long as the server may: when that thread ends, even by SIGKILL, the server is
    told to stop.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        model_repository: pathlib.Path = repository.REPOSITORY,
        models: tuple[str, ...] = repository.MODELS,
        log_path: pathlib.Path | None = None,
        environ: Mapping[str, str] = os.environ,
        on_line: Callable[[str], None] | None = None,
        arguments: tuple[str, ...] = (),
        restarts: int = 0,
        base_folder: pathlib.Path | None = None,
    ):
        self.settings = settings
        self.model_repository = model_repository
        self.models = models
        self.log_path = log_path or _new_log(settings.cache_dir / "logs")
        host = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
        self.http_url = f"http://{host}:{settings.http_port}"
        self.grpc_url = f"{host}:{settings.grpc_port}"
        self.metrics_url = f"http://{host}:{settings.metrics_port}/metrics"
        self._environ = environ
        self._on_line = on_line or (lambda line: None)
        self._arguments, self._base_folder = arguments, base_folder
        self._shared_memory = f"jaxlora-{uuid.uuid4().hex[:12]}-"
        self._lifeline = Lifeline(restarts)
        self._process: subprocess.Popen | None = None
        self._was_ready = False
        self._reader: threading.Thread | None = None

    @property
    def store(self) -> pathlib.Path:
        """The adapter store: the folder that holds `users/`."""
        return self.model_repository / repository.STORE

    @property
    def pid(self) -> int:
        """Process id of `tritonserver`, which is the id of its process group as well."""
        return self._started().pid

    def __enter__(self) -> "TritonServer":
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server and returns at once.

        Raises:
            SetupError: there is no server that can be run here.
        """
        found = installation.find(self.settings.cache_dir, self._environ)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        repository.compile_models(self.model_repository, self.models)
        self._lifeline.open()
        self._process = subprocess.Popen(
            # Not `preexec_fn`: that forks this process, which may have JAX's threads in it.
            [sys.executable, "-I", "-S", "-c", _UNTIL_PARENT_ENDS, str(os.getpid()), *self._command(found)],
            env=self._environment(found),
            cwd=repository.PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="triton-log", daemon=True)
        self._reader.start()

    def wait_until_ready(self, timeout_s: float = float("inf")) -> None:
        """Returns when all models are loaded and requests are taken.

        Raises:
            ServerDied: the server ended before.
            TimeoutError: it was not ready after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            if self.has_ended():
                raise ServerDied(self._obituary())
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server was not ready after {timeout_s:g} s; its log is {self.log_path}")
            time.sleep(0.1)
        self._was_ready = True

    def is_ready(self) -> bool:
        """Whether the server answers that it and its models are ready."""
        try:
            with _DIRECT.open(f"{self.http_url}/v2/health/ready", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def has_ended(self) -> bool:
        """Whether `tritonserver` has ended."""
        # WNOWAIT: it is not reaped before its group has been killed, so nobody else can have got the group's id.
        process = self._started()
        return process.returncode is not None or os.waitid(os.P_PID, process.pid, _PEEK | os.WNOHANG) is not None

    def wait(self) -> None:
        """Returns never, while all goes well.

        Raises:
            EngineStopped: a model's engine has stopped, or its process crashed.
            ServerDied: the server has ended.
        """
        while not self.has_ended():
            if self._lifeline.failure is not None:
                raise EngineStopped(self._lifeline.failure)
            time.sleep(0.2)
        raise ServerDied(self._obituary())

    def stop(self, timeout_s: float = EXIT_TIMEOUT_S + 5) -> None:
        """Stops the server and every process it started. What is in flight may finish within GRACE_S. Does nothing twice."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        try:
            if not self.has_ended():
                self._lifeline.drain(self.settings.grace_s + 5)
                process.terminate()
            deadline = time.monotonic() + (_IDLE_EXIT_S if self._lifeline.crashed else timeout_s)
            while not self.has_ended() and time.monotonic() < deadline:
                if _living(process.pid) == 1:
                    deadline = min(deadline, time.monotonic() + _IDLE_EXIT_S)
                time.sleep(0.05)
        finally:  # also when a second Ctrl-C comes in
            self.kill()

    def kill(self) -> None:
        """Ends the server and every process it started at once, as a crash would."""
        process = self._started()
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._reader.join(timeout=5)
            self._lifeline.close()
            for segment in pathlib.Path("/dev/shm").glob(f"{self._shared_memory}*"):
                segment.unlink(missing_ok=True)

    def last_lines(self, count: int = 15) -> list[str]:
        """The last lines of the server's output."""
        try:
            return self.log_path.read_text(errors="replace").splitlines()[-count:]
        except OSError:
            return []

    def _started(self) -> subprocess.Popen:
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    def _command(self, found: installation.Installation) -> list[str]:
        settings = self.settings
        command = [
            str(found.binary),
            f"--model-repository={self.model_repository}",
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in self.models),
            # Else every Python model is imported twice at start, the first time only to ask for its configuration.
            "--disable-auto-complete-config",
            f"--backend-config=python,stub-timeout-seconds={_STUB_TIMEOUT_S}",
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory}",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            f"--http-address={settings.host}",
            f"--http-port={settings.http_port}",
            f"--grpc-address={settings.host}",
            f"--grpc-port={settings.grpc_port}",
            f"--metrics-address={settings.host}",
            f"--metrics-port={settings.metrics_port}",
            *access.arguments(settings.admin_key),
        ]
        if found.backend_directory is not None:
            command.append(f"--backend-directory={found.backend_directory}")
        return [*command, *self._arguments]

    def _environment(self, found: installation.Installation) -> dict[str, str]:
        environment = allocator.environment({**self._environ, **self.settings.environment(), **self._lifeline.environment})
        environment.pop("AIP_MODE", None)  # it would open Vertex AI's routes, which ask for no key
        environment.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy starts threads as it is imported, in every model, which none of them uses
        environment[BASE_FOLDER] = str(self._base_folder or "")
        before = {
            "PATH": [pathlib.Path(sys.prefix, "bin")],  # the Python backend takes its packages from the first python3 there
            # For stubs that read it. Those of the wheel are isolated from the environment, and find the project as their working folder.
            "PYTHONPATH": [repository.PROJECT],
            "LD_LIBRARY_PATH": found.library_path,
        }
        for name, folders in before.items():
            environment[name] = os.pathsep.join([*map(str, folders), *filter(None, [environment.get(name)])])
        return environment

    def _read(self) -> None:
        with self.log_path.open("ab", buffering=0) as log:
            fcntl.flock(log, fcntl.LOCK_SH)  # see _new_log
            for line in self._started().stdout:
                with contextlib.suppress(OSError):  # a full disk: a server whose output nobody reads would come to a halt
                    log.write(line)
                with contextlib.suppress(OSError, ValueError):  # nobody reads what it prints any more
                    self._on_line(line.decode(errors="replace").rstrip("\n"))

    def _obituary(self) -> str:
        status = os.waitid(os.P_PID, self.pid, _PEEK)
        self._reader.join(timeout=2)
        ended = f"signal {signal.Signals(status.si_status).name}" if status.si_code != os.CLD_EXITED else f"code {status.si_status}"
        log = self.last_lines(10_000)
        # Once it has been ready, a load that failed was a publish that was refused.
        reasons = [] if self._was_ready else [reason for line in log if (reason := failed_load(line))]
        told = reasons or [line for line in log if line.strip() and line[0] not in "+|"][-15:]  # without Triton's tables
        return "\n".join([f"the server ended with {ended}", *(f"  {line}" for line in told), f"its whole log is {self.log_path}"])


_PEEK = os.WEXITED | os.WNOWAIT


def _living(group: int) -> int:
    """The number of processes of a group that have not ended."""
    count = 0
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text(errors="replace").rpartition(") ")[2].split()[:3]
        except OSError:
            continue  # it has ended meanwhile
        count += int(its_group) == group and state != "Z"
    return count


def failed_load(line: str) -> str | None:
    """What a line of Triton's log tells about a model that can't be loaded, without the traceback; None for other lines."""
    match = _FAILED_LOAD.match(line)
    if match is None:
        return None
    reason = match["reason"].split(r"\n\nAt:")[0].removeprefix("Internal: ").removeprefix("TritonModelException: ")
    return f"{match['model']}: " + reason.replace(r"\n", "\n  ")


def _new_log(folder: pathlib.Path, keep: int = 10) -> pathlib.Path:
    """A name for a new log in `folder`, from which all but the newest are removed, and those that a server still writes."""
    for old in sorted(folder.glob("triton-*.log"))[: 1 - keep]:
        with contextlib.suppress(OSError), old.open() as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            old.unlink()
    return folder / time.strftime(f"triton-%Y%m%d-%H%M%S-{uuid.uuid4().hex[:6]}.log", time.gmtime())
