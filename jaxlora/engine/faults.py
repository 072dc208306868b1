"""A program whose steps go wrong as `jaxlora.faults` says. Nothing of it is there unless faults are asked for."""

import logging
import time
from typing import Any

import jax
import numpy as np

from jaxlora.engine.batch import Batch
from jaxlora.engine.program import Program
from jaxlora.engine.sampling import Sampled
from jaxlora.faults import Fault

log = logging.getLogger(__name__)


class FaultyProgram:
    """A `Program` with faults, in its place."""

    def __init__(self, program: Program, faults: tuple[Fault, ...]):
        self._program, self._faults = program, faults
        self._broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def run(self, batch: Batch) -> Sampled:
        """As `Program.run`, where no fault is due."""
        if self._broken:
            raise jax.errors.JaxRuntimeError("INTERNAL: the device is broken (FAULTS)")
        not_finite = np.zeros(len(batch.slots), bool)
        for fault in self._faults:
            rows = _rows(batch, fault)
            if rows.any() and self._is_due(fault):
                if fault.kind == "not_finite":
                    not_finite |= rows
                else:
                    self._happen(fault, batch.steps)
        sampled = self._program.run(batch)
        return sampled.replace(ok=sampled.ok & ~not_finite[:, None])

    def put_adapter(self, slot: int, vector: np.ndarray, rank: int) -> None:
        """As `Program.put_adapter`, where no fault is due."""
        for fault in self._faults:
            if fault.place == "adapter" and self._is_due(fault):
                self._happen(fault)
        self._program.put_adapter(slot, vector, rank)

    @staticmethod
    def _is_due(fault: Fault) -> bool:
        fault.times -= 1
        return fault.times >= 0

    def _happen(self, fault: Fault, steps: int = 1) -> None:
        log.warning("FAULTS: %s:%s", fault.place, fault.kind)
        if fault.kind == "slow":
            return time.sleep(fault.seconds * steps)
        if fault.kind == "state_lost":
            jax.tree.map(lambda array: array.delete(), self._program.state)
        self._broken = fault.kind == "broken"
        what = "RESOURCE_EXHAUSTED: Out of memory" if fault.kind == "out_of_memory" else f"INTERNAL: {fault.kind} in {fault.place}"
        raise jax.errors.JaxRuntimeError(f"{what} (FAULTS)")


def _rows(batch: Batch, fault: Fault) -> np.ndarray:
    """The rows of a batch that a fault is for; none if there are too few that do anything."""
    place = {"prefill": batch.reads == 1, "decode": batch.reads == 0}
    active = (batch.lengths > 0) & place.get(fault.place, False)
    if active.sum() <= fault.rows:
        return np.zeros_like(active)
    seeds = batch.sampler.key.astype(np.uint64)
    return active if fault.seed is None else active & ((seeds[:, 0] << np.uint64(32) | seeds[:, 1]) == np.uint64(fault.seed))
