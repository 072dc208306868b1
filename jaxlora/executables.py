"""Compiled programs on disk that are found without tracing them again.

JAX's own cache knows a program by its HLO, which Python has to make first, at every start: up to a third of a second for each step of a
model. Here an index, named after all that tracing depends on, leads from a program's name to the key of its HLO, and that to its file.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import platform
import zlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.stages import Compiled, Lowered

from jaxlora.files import replace

CODE = pathlib.Path(__file__).parent
log = logging.getLogger(__name__)


class Executables:
    """Those of one set of programs, in a folder that only its owner may write to, since what lies there is run.

    Arguments:
        folder: made when it is needed; processes may share it. None: nothing is kept, but by JAX itself.
        options: the compiler's, for all of them.
        traced_from: what tracing depends on, besides this package, its dependencies, JAX's settings and the machine.
    """

    def __init__(self, folder: pathlib.Path | None, options: Mapping[str, Any], traced_from: Any):
        self._folder = folder
        self._keys: dict[str, str] = {}
        self._data: dict[str, bytes] = {}
        self.new: list[str] = []
        """Names of what `keep` would write."""
        if folder:
            self._compiled_with = _digest(_environment(), dict(options))
            self._index = folder / f"{_digest(self._compiled_with, _code(), traced_from)}.json"
            with contextlib.suppress(OSError, ValueError, TypeError):
                self._keys = dict(json.loads(self._index.read_text(encoding="utf-8")))

    def find(self, name: str, arguments: Any, result: Any) -> Compiled | None:
        """The program of that name, where it is kept. Any thread may call it.

        Arguments:
            arguments, result: pytrees like those that it takes and returns.
        """
        if name not in self._keys:
            return None
        return self._read(self._keys[name], jax.tree.structure((arguments, {})), jax.tree.structure(result))

    def compile(self, name: str, lowered: Lowered) -> Compiled:
        """The program, compiled unless one with the same HLO is kept. Any thread may call it, within `compiling`."""
        if not self._folder:
            return lowered.compile()
        key = _digest(self._compiled_with, lowered.as_text())
        found = self._read(key, lowered.in_tree, lowered.out_tree)
        if not found:
            compiled = lowered.compile()
            try:
                payload, in_tree, out_tree = serialize(compiled)
                found = _load(payload, in_tree, out_tree)  # so that what runs now is what will run then
            except Exception:  # whatever this version of JAX can't serialize
                return compiled
            self._data[key] = zlib.compress(payload, 1)
        self._keys[name] = key
        self.new.append(name)
        return found

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Has JAX read nothing from its own cache: an executable from there lacks functions when it's serialized again (jaxlib 0.7.1)."""
        before = jax.config.jax_enable_compilation_cache
        try:
            _switch_jax_cache(before and not self._folder)
            yield
        finally:
            _switch_jax_cache(before)

    def keep(self) -> None:
        """Writes what is new. To be called when all of it has run without an error."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for key, data in self._data.items():
                replace(self._path(key), data)
            replace(self._index, json.dumps(self._keys, indent=1).encode())
        except OSError as error:
            log.warning("compiled steps can't be kept, so the next start takes longer: %s", error)

    def _path(self, key: str) -> pathlib.Path:
        return self._folder / f"{key}.executable"

    def _read(self, key: str, in_tree: Any, out_tree: Any) -> Compiled | None:
        try:
            return _load(zlib.decompress(self._path(key).read_bytes()), in_tree, out_tree)
        except Exception:  # absent, damaged (there is a checksum), or refused by XLA for whatever reason: it's compiled again
            return None


def _switch_jax_cache(on: bool) -> None:
    if on != jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", on)
        compilation_cache.reset_cache()  # it reads the setting once only


def _load(payload: bytes, in_tree: Any, out_tree: Any) -> Compiled:
    return deserialize_and_load(payload, in_tree, out_tree, execution_devices=jax.devices()[:1])


def _environment() -> list[Any]:
    """What decides how HLO is compiled, and whether the result runs here."""
    versions = [platform.python_version(), *map(version, ("jax", "jaxlib", "flax", "numpy"))]
    settings = sorted((name, value) for name, value in jax.config.values.items() if "cache" not in name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # XLA cuts loops into as many parts
    return [versions, settings, os.environ.get("XLA_FLAGS"), cores, _cpu()]


@functools.cache
def _cpu() -> list[str]:
    """The machine's architecture, and the model and features of its first core."""
    try:
        first, _, _ = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
    except OSError:
        first = platform.processor()
    return [platform.machine(), *(line for line in first.splitlines() if line.startswith(("model name", "flags", "Features")))]


@functools.cache
def _code() -> str:
    """This package, with its kernels."""
    digest = hashlib.sha256()
    for path in sorted(path for path in CODE.rglob("*") if path.suffix in (".py", ".cc", ".h")):
        digest.update(f"{path.relative_to(CODE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
