"""One run of the benchmark: which systems there are, starting them, and having them answer row by row in turns."""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bench import measure, processes
from bench.drivers import DRIVERS
from bench.worker import Answer, DriverFailed, Request, Unsupported, Worker
from bench.workloads import Prompts, Row
from server.repository import PROJECT

WARM_UP_TOKENS = 8
SETTLE_S = 0.3
"""Between two turns, for threads that still spin."""

Say = Callable[[str], None]


@dataclasses.dataclass
class Running:
    """A system that has started."""

    worker: Worker
    started: dict[str, Any]


class Session:
    """The systems of one precision.

    Arguments:
        setup: what the drivers start from, see `bench.__main__`.
        pythons: other environments than the usual ones, by system.
        logs: folder for what the drivers print.
        say: told what is going on.
    """

    def __init__(self, setup: Mapping[str, Any], pythons: Mapping[str, str], logs: pathlib.Path, say: Say):
        self._setup, self._pythons, self._logs, self._say = setup, pythons, logs, say
        self.running: dict[str, Running] = {}
        self.missing: dict[str, str] = {}

    @contextlib.contextmanager
    def systems(self, names: Sequence[str]) -> Iterator["Session"]:
        """Starts these systems, those that can't be started are in `missing` with the reason; stops them in the end."""
        try:
            for name in names:
                self._start(name)
            yield self
        finally:
            for running in self.running.values():
                running.worker.stop()
            self.running.clear()

    def describe(self) -> dict[str, Any]:
        """What has started, with versions and the seconds that it took, and what has not, with the reason."""
        started = {name: running.started for name, running in self.running.items()}
        return started | {name: {"missing": reason} for name, reason in self.missing.items()}

    def row(self, row: Row, prompts: Prompts, adapters: Sequence[str], repetitions: int) -> dict[str, Any]:
        """Every system's numbers for a row, from repetitions that take turns after one short run each."""
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in self.running}
        ids: dict[str, list[list[int]]] = {}
        refusals: dict[str, str] = {}
        for repetition in range(-1, repetitions):
            requests = prompts.requests(row, adapters, repetition + 1, WARM_UP_TOKENS if repetition < 0 else None)
            for name in [name for name in turns if name not in refusals]:
                try:
                    answers, load = self.turn(name, requests, row.streams)
                except (Unsupported, DriverFailed) as error:
                    self._say(f"  {name}: {error}")
                    refusals[name] = str(error)
                    continue
                if repetition >= 0:
                    turns[name].append({"run": measure.run_of(answers, row.prompt * row.streams), **load})
                    ids.setdefault(name, [answer.ids for answer in answers])
        found: dict[str, Any] = {}
        for name, measured in turns.items():
            found[name] = {"cannot": refusals[name]} if name in refusals else _summary(measured)
        reference = "peft" if "peft" in ids else "engine"
        for name in ids.keys() - refusals.keys():
            if reference in ids and all(ids[name]) and not requests[0].sampling["temperature"]:
                found[name]["agreement"] = {"with": reference, "share": measure.agreement(ids[name], ids[reference])}
        speed = "prefill" if row.answer == 1 else "decode"
        self._say(f"  {row}: " + ", ".join(f"{name} {numbers[speed]['median']:.0f}" for name, numbers in found.items() if speed in numbers))
        return {**dataclasses.asdict(row), "systems": found}

    def turn(self, name: str, requests: Sequence[Request], concurrency: int) -> tuple[list[Answer], dict[str, Any]]:
        """One system's answers, and what it and the rest of the machine used meanwhile.

        Raises:
            DriverFailed: also if an answer is not as long as it was asked for.
        """
        worker = self.running[name].worker
        time.sleep(SETTLE_S)
        begin, own, machine = time.monotonic(), processes.cpu_seconds(worker.driver_pid), processes.machine_seconds()
        answers = worker.run(requests, concurrency)
        wall = time.monotonic() - begin
        own, machine = processes.cpu_seconds(worker.driver_pid) - own, processes.machine_seconds() - machine
        lengths = [answer.tokens for answer in answers]
        if lengths != [request.answer for request in requests]:
            raise DriverFailed(f"{name}: answers of {sorted(set(lengths))} tokens")
        # Of less than a second the kernel's counters of hundredths tell too little.
        elsewhere = max(0.0, machine - own) / (wall * len(os.sched_getaffinity(0))) if wall >= 1 else 0.0
        return answers, {"memory_bytes": processes.memory_bytes(worker.pid), "elsewhere": elsewhere}

    def _start(self, name: str) -> None:
        system = DRIVERS[name]
        if not (PROJECT / system.needs).exists() and name not in self._pythons:
            self.missing[name] = "not installed (`make bench-peers`)"
            return
        self._say(f"starting {system.title}")
        python = self._pythons.get(name, str(PROJECT / system.python))
        worker = Worker(name, python, system.module, self._logs / f"{name}.log", PROJECT)
        begin = time.monotonic()
        try:
            started = worker.start(self._setup)
        except (DriverFailed, Unsupported) as error:
            worker.stop()
            self._say(f"  {error}")
            self.missing[name] = str(error)
            return
        self.running[name] = Running(worker, started | {"start_s": time.monotonic() - begin})


def _summary(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    runs = [turn["run"] for turn in measured]
    return {
        **measure.summary(runs),
        "turns": [{"decode": run.decode, "output": run.output, "prefill": run.prefill} for run in runs],
        "memory_bytes": max(turn["memory_bytes"] for turn in measured),
        "elsewhere": max(turn["elsewhere"] for turn in measured),
    }
