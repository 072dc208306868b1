"""The folder of one run: what it computes (`run.json`), its metrics log, and the adapter that it ends with.

One process has it at a time.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jaxlora.errors import SetupError
from jaxlora.files import replace

CONFIG, METRICS = "run.json", "metrics.jsonl"


class RunFolder:
    """A run's folder, made when it is entered."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.hash = ""

    @contextlib.contextmanager
    def held(self, config: Mapping[str, Any], restart: bool) -> Iterator[bool]:
        """Holds the folder for a run with this config; gives whether there was one before, to be continued.

        Arguments:
            config: everything that defines what the run computes.
            restart: move aside what is there.

        Raises:
            SetupError: the folder can't be written, another process has it, or it holds a run with another config: names the
                differences.
        """
        with contextlib.ExitStack() as locks:
            try:
                if restart and self.path.exists():
                    locks.callback(os.close, self._locked())  # who trains there would go on writing, into what follows
                    os.rename(self.path, self.path.with_name(f"{self.path.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"))
                self.path.mkdir(parents=True, exist_ok=True)
                locks.callback(os.close, self._locked())
            except BlockingIOError:
                raise SetupError(f"--run: another process is training in {self.path}") from None
            except OSError as error:
                raise SetupError(f"--run: {self.path} can't be used: {error.strerror}") from None
            yield self._claim(dict(config))

    def config(self, restart: bool) -> dict[str, Any]:
        """The config of the run that is to be continued; empty where there is none, or where it is to be started over."""
        try:
            return {} if restart else json.loads((self.path / CONFIG).read_text())
        except (OSError, ValueError):
            return {}

    def log(self, entry: Mapping[str, Any]) -> None:
        """Adds a line to the metrics log."""
        with open(self.path / METRICS, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the metrics log that are whole."""
        return [entry for line in self._lines() if (entry := _entry(line)) is not None]

    def forget_after(self, step: int) -> None:
        """Takes out of the metrics log what a run that goes on from `step` will write again."""
        kept = [entry for entry in self.metrics() if entry["step"] <= step]
        replace(self.path / METRICS, "".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def _locked(self) -> int:
        """An open file that holds the lock of the folder. Raises BlockingIOError where another process has it."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _claim(self, config: dict[str, Any]) -> bool:
        text = json.dumps(config, indent=1, sort_keys=True)
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        path = self.path / CONFIG
        if not path.exists():
            try:
                replace(path, text.encode())
            except OSError as error:
                raise SetupError(f"--run: {self.path} can't be written: {error.strerror}") from None
            return False
        try:
            before, now = dict(json.loads(path.read_text())), json.loads(text)
        except (OSError, ValueError, TypeError):
            raise SetupError(f"--run: {path} can't be read, so nobody knows what this run computes; --restart starts over") from None
        differences = [
            f"  {key}: {json.dumps(before.get(key))} then, {json.dumps(now.get(key))} now"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        if differences:
            raise SetupError(
                f"{self.path} holds a run with another configuration (--restart starts over, --run names another folder):\n"
                + "\n".join(differences)
            )
        return True

    def _lines(self) -> list[str]:
        path = self.path / METRICS
        return path.read_text().splitlines() if path.exists() else []


def _entry(line: str) -> dict[str, Any] | None:
    # A process that was killed may leave half a line.
    with contextlib.suppress(ValueError):
        return json.loads(line)
    return None
