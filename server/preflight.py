"""What can be known to be wrong before anything is loaded.

Every check gives lines, each naming the setting and what to do; all of them are shown at once. Knows sockets, folders and memory, and
asks the library about the base model; starts nothing.
"""

import dataclasses
import importlib.util
import os
import pathlib
import shlex
import socket
import subprocess
from collections.abc import Callable, Iterable

from jaxlora.errors import SetupError
from jaxlora.settings import Settings
from server import repository

PORTS = ("http_port", "grpc_port", "metrics_port")
GIB = 1 << 30
GPU = "the GPU"


def check(settings: Settings, progress: Callable[[str], None] = print) -> pathlib.Path:
    """Checks ports, cache folder, base model, lengths and memory. Converts the base model if that was not done before.

    Returns:
        The folder of the base model.

    Raises:
        SetupError: one line for every problem found.
    """
    problems = [*port_problems(settings), *cache_problems(settings.cache_dir), *path_problems(settings)]
    if problems:
        raise SetupError("\n".join(problems))
    # Late, because both read NumPy; a taken port is to be told at once.
    from jaxlora.checkpoint import resolve
    from jaxlora.config import ModelConfig
    from jaxlora.service import check_length, memory_estimate

    folder = resolve(settings.model, settings.cache_dir, progress)
    config = ModelConfig.from_folder(folder)
    check_length(settings, config)
    available, where = device_memory()
    if settings.dtype == "auto" and where == GPU:
        settings = dataclasses.replace(settings, dtype="bfloat16")
    problems = memory_problems(memory_estimate(settings, config), available, where, settings.dtype == "auto")
    if problems:
        raise SetupError("\n".join(problems))
    return folder


def with_address(settings: Settings) -> Settings:
    """The settings with HOST as an IPv4 address: Triton's HTTP and metrics know no names, and none of its ports IPv6.

    Raises:
        SetupError: HOST has no such address.
    """
    try:
        found = socket.getaddrinfo(settings.host, None, socket.AF_INET, socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise SetupError(f"HOST: {settings.host!r} is no IPv4 address, nor the name of one ({error})") from None
    return dataclasses.replace(settings, host=found[0][4][0])


def port_problems(settings: Settings) -> list[str]:
    """A line for each port that is taken, and for each that two settings share."""
    problems, owners = [], {}
    for name in PORTS:
        port, variable = getattr(settings, name), name.upper()
        if port in owners:
            problems.append(f"{variable}: {port} is the {owners[port]} too; give each its own port")
            continue
        owners[port] = variable
        try:
            reserve(settings.host, port).close()
        except OSError as error:
            problems.append(
                f"{variable}: can't listen on {settings.host}:{port} ({error.strerror}); "
                f"stop what listens there, or choose another port: make serve {variable}=..."
            )
    return problems


def cache_problems(cache_dir: pathlib.Path) -> list[str]:
    """A line if the cache folder can't be made or written."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [f"CACHE_DIR: can't make {cache_dir} ({error.strerror})"]
    return [] if os.access(cache_dir, os.W_OK | os.X_OK) else [f"CACHE_DIR: {cache_dir} can't be written"]


def path_problems(settings: Settings) -> list[str]:
    """A line for each folder with a name that Triton's Python backend, which starts a model through a shell, can't pass on."""
    problems = [
        f"{what}: {str(path)!r} holds a space or another character that Triton can't start a model with; letters A to Z, digits and `_-.+@%` are fine"
        for what, path in (("CACHE_DIR", settings.cache_dir), ("the project's folder", repository.PROJECT))
        if shlex.quote(str(path)) != str(path)
    ]
    return problems if settings.model.isascii() else [*problems, f"MODEL: {settings.model!r} holds letters that are not ASCII, which a model can't open"]


def memory_problems(estimate: dict[str, int], available: int | None, where: str, counted_as_float32: bool = False) -> list[str]:
    """A line if the parts of `estimate` (bytes by what they are for) do not fit into `available` bytes; None is unknown.

    Arguments:
        counted_as_float32: the type is not known yet, and may turn out to be half as large.
    """
    needed = sum(estimate.values())
    if available is None or needed <= available:
        return []
    parts = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in sorted(estimate.items(), key=lambda part: -part[1]))
    return [
        f"MAX_SLOTS, MAX_SEQ_LEN, LORA_SLOTS, MAX_LORA_RANK: {needed / GIB:.2f} GiB are needed ({parts}), "
        f"and {where} has {available / GIB:.2f} GiB free; make one of them smaller"
        + (", or set DTYPE=bfloat16 (DTYPE=auto is counted as float32)" if counted_as_float32 else "")
    ]


def device_memory() -> tuple[int | None, str]:
    """Free bytes of the memory that the model will be in, and its name for people."""
    if any(importlib.util.find_spec(plugin) for plugin in ("jax_cuda12_plugin", "jax_cuda13_plugin")):
        try:
            command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
            return int(answer.splitlines()[0]) << 20, GPU
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            pass  # no usable GPU: JAX will run on the CPU
    return min(_host_memory(), default=None), "this machine"


def _host_memory() -> Iterable[int]:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) << 10
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        statistics = dict(line.split() for line in _lines(f"/sys/fs/cgroup/{pathlib.PurePath(usage).with_name('memory.stat')}"))
        for most in _lines(f"/sys/fs/cgroup/{limit}"):
            for used in _lines(f"/sys/fs/cgroup/{usage}"):
                if most.isdigit():
                    yield int(most) - int(used) + int(statistics.get(cached, 0))


def _lines(path: str) -> list[str]:
    try:
        return pathlib.Path(path).read_text().splitlines()
    except OSError:
        return []


def reserve(host: str, port: int) -> socket.socket:
    """A socket bound to `host`:`port` (0: any free one). Raises OSError where that is not possible."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        # As the server will: a port in TIME_WAIT is free, one that somebody listens on is not.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports that nobody listens on."""
    sockets = [reserve(host, 0) for _ in range(count)]
    try:
        return [bound.getsockname()[1] for bound in sockets]
    finally:
        for bound in sockets:
            bound.close()
