"""Fairness between adapters: the real engine on a simulated clock, on which every step takes the time that it is said to take."""

import math
import random
import threading
import types

import pytest

from jaxlora.engine import Account, Bounds, Engine, Limits, Request, SamplingParams, Sizes, engine as engine_module
from jaxlora.errors import Unavailable
from tests.test_engine_scheduler import Counting, Readers

SHARED_SLOTS, RESERVED_SLOTS, CHUNK, MAX_SEQ_LEN = 16, 2, 128, 2048
SLOTS = SHARED_SLOTS + RESERVED_SLOTS
LIMITS = Limits(reserved_slots=RESERVED_SLOTS, adapter=Bounds(max_queue=128), prefix_cache=False)
LIGHT, HEAVY = Account("alice/light", "alice"), Account("bob/heavy", "bob")
TIMES_AS_MUCH, REQUESTS = 50, 40


def prefill_s(tokens: int) -> float:
    return 0.0005 * tokens


def decode_s(rows: int) -> float:
    return 0.01 + 0.001 * rows


STEP_S = prefill_s(CHUNK) + decode_s(SLOTS)
"""A step of the engine: one chunk of a prompt, and a token for every row."""


class Simulation(Counting):
    """A program whose steps move the clock, and from which the requests come that arrive meanwhile.

    `arrivals` are (seconds, account, prompt tokens, answer tokens); `ttft` holds the seconds to the first token of each light request.
    """

    def __init__(self, arrivals: list[tuple[float, Account, int, int]]):
        super().__init__(SLOTS, CHUNK, batch_sizes=(1, 2, 4, 8, 16, SLOTS))
        self.sizes = Sizes(SLOTS, MAX_SEQ_LEN, CHUNK, 2, 4)
        self.now, self.ttft, self.open, self.refused = 0.0, [], 0, 0
        self.over = threading.Event()
        self._arrivals = sorted(arrivals, key=lambda arrival: arrival[0], reverse=True)
        self._light = sum(1 for _, account, *_ in arrivals if account is LIGHT)

    def monotonic(self) -> float:
        return self.now

    def simulate(self, monkeypatch, limits: Limits) -> list[float]:
        monkeypatch.setattr(engine_module, "time", types.SimpleNamespace(monotonic=self.monotonic))
        self.engine = Engine(self, Readers(), limits)
        self.gate.clear()
        self.go_on()
        self.gate.set()
        assert self.over.wait(60)
        self.engine.stop()
        return self.ttft

    def run(self, batch):
        sampled = super().run(batch)
        rows, length = batch.tokens.shape
        self.now += prefill_s(length) if length > 1 else decode_s(rows)
        self._arrive()
        return sampled

    def go_on(self) -> None:
        """Where nothing is under way, the clock moves to the next arrival."""
        if not self.open and self._arrivals:
            self.now = max(self.now, self._arrivals[-1][0])
            self._arrive()

    def _arrive(self) -> None:
        while self._arrivals and self._arrivals[-1][0] <= self.now and not self.over.is_set():
            arrived, account, prompt, answer = self._arrivals.pop()
            params = SamplingParams(max_tokens=answer)
            try:
                self.engine.submit(Request((1,) * prompt, params, SimulatedSink(self, arrived, account), account=account))
                self.open += 1
            except Unavailable:
                self.refused += 1
                assert account is HEAVY

    def first_token(self, arrived: float, account: Account) -> None:
        if account is LIGHT:
            self.ttft.append(self.now - arrived)
            if len(self.ttft) == self._light:
                self.over.set()


class SimulatedSink:
    def __init__(self, simulation: Simulation, arrived: float, account: Account):
        self._simulation, self._arrived, self._account, self._begun = simulation, arrived, account, False

    def token(self, token) -> bool:
        if not self._begun:
            self._begun = True
            self._simulation.first_token(self._arrived, self._account)
        return False

    def finish(self, result) -> None:
        self._simulation.open -= 1
        self._simulation.go_on()

    def fail(self, error) -> None:
        self._simulation.open -= 1


def arriving(account: Account, every_s: float, until_s: float, prompt: int, answer: int, seed: int) -> list[tuple[float, Account, int, int]]:
    """Arrivals at random, so many seconds apart in the mean."""
    rng, now, found = random.Random(seed), 0.0, []
    while (now := now + rng.expovariate(1 / every_s)) < until_s:
        found.append((now, account, prompt, answer))
    return found


def p95(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


@pytest.mark.parametrize(
    ("light", "heavy", "every_s"),
    [
        pytest.param((64, 32), (64, 32), 2.0, id="the same prompts and answers"),
        pytest.param((64, 32), (64, 1500), 4.0, id="long answers hold the slots"),
        pytest.param((64, 32), (1500, 32), 2.0, id="long prompts take the steps"),
        pytest.param((1024, 16), (100, 4), 8.0, id="a long prompt among many short ones"),
        pytest.param((512, 100), (512, 100), 6.0, id="long prompts and answers"),
    ],
)
def test_fifty_times_the_load_of_another_adapter_hardly_delays_the_first_token(monkeypatch, light, heavy, every_s):
    """Fifty times as many requests a second, and tokens a second; it is more than the engine can serve."""
    until_s = REQUESTS * every_s
    few = arriving(LIGHT, every_s, until_s, *light, seed=1)
    many = arriving(HEAVY, every_s * min(1, sum(heavy) / sum(light)) / TIMES_AS_MUCH, until_s, *heavy, seed=2)
    alone = p95(Simulation(few).simulate(monkeypatch, LIMITS))
    crowded = Simulation(few + many)
    found = p95(crowded.simulate(monkeypatch, LIMITS))
    assert crowded.refused
    assert found <= 1.5 * alone + 2 * STEP_S


def test_an_adapter_that_is_alone_fills_every_slot_but_the_reserved_ones(monkeypatch):
    many = arriving(HEAVY, 0.02, 20, 64, 200, seed=1)
    alone = Simulation([*many, (19.0, LIGHT, 1, 1)])
    alone.simulate(monkeypatch, LIMITS)
    rows = [len(slots) for shape, slots, _ in alone.steps if shape[1] == 1]
    assert max(rows) == SHARED_SLOTS and rows[len(rows) // 2 :].count(SHARED_SLOTS) > 0.9 * len(rows) / 2
