"""The training loop: steps, checkpoints, evaluation, early stopping, signals. Knows no method, no text and no store."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlora.config import ModelConfig
from jaxlora.lora import Adapter
from jaxlora.weights import Weights
from training.checkpoints import Checkpoints
from training.curve import draw
from training.machine import Machine, XlaMachine
from training.method import HeldOut, Method, Window
from training.optimizers import at_rate, make_optimizer, make_schedule
from training.options import Options
from training.policy import Noise
from training.progress import Display
from training.run_folder import RunFolder
from training.step import AXIS, State, StepOptions, make_evaluation, make_step, new_state

FIRST_SCALE = 2.0**12  # of the loss, in float16


class TrainingStopped(Exception):
    """The run did not get to its end; `str()` says why, and what to do."""


class Interrupted(TrainingStopped):
    """A signal ended the run. `signal` is the signal's number, `saved` the step that the same command goes on from."""

    def __init__(self, number: int, step: int, saved: int):
        self.signal = number
        there = "there" if saved == step else f"step {saved}, the last that could be saved" if saved else "the start"
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; the same command goes on from {there}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run ends with: the adapter, the optimizer step that it is of, and its scores on held-out data."""

    adapter: Adapter
    step: int
    scores: Mapping[str, float]


@dataclasses.dataclass
class _Position:
    """Where a run stands: everything that the rest of it depends on, besides its configuration. `best` is the adapter of the best
    evaluation so far, `worse` counts the evaluations since."""

    done: int
    state: State
    best: Adapter
    best_score: float = math.inf
    best_step: int = 0
    best_scores: dict[str, float] = dataclasses.field(default_factory=dict)
    worse: int = 0
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    ended: bool = False

    @property
    def arrays(self) -> dict[str, Any]:
        return {"state": self.state, "best": self.best}

    @property
    def facts(self) -> dict[str, Any]:
        """The rest of it, as JSON holds it."""
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in ("state", "best")
        }


class Trainer:
    """One run.

    Arguments:
        start: the adapter to start from.
        held_out_scores: more scores of an adapter on held-out data, for example task metrics, by name.
        say: told what is going on before there is a progress bar.
        machine: what computes; `weights` are packed for it.
    """

    def __init__(
        self,
        options: Options,
        config: ModelConfig,
        weights: Weights,
        method: Method,
        start: Adapter,
        folder: RunFolder,
        say: Callable[[str], None],
        held_out_scores: Callable[[Adapter], Mapping[str, float]] = lambda adapter: {},
        machine: Machine = XlaMachine(),
    ):
        self._options, self._method, self._folder, self._say = options, method, folder, say
        self._held_out_scores = held_out_scores
        self.total_steps = options.max_steps or max(1, math.ceil(options.epochs * method.source.steps_per_epoch))
        self._schedule = make_schedule(
            options.schedule, options.schedule_args,
            peak=options.lr, warmup_steps=round(options.warmup * self.total_steps), total_steps=self.total_steps,
        )  # fmt: skip
        self._optimizer = make_optimizer(options.optimizer, options.optimizer_args, self._rate(0), options.seed)
        self._mesh = _mesh(options.micro_batch)
        step_options = StepOptions(
            options.max_grad_norm,
            options.lora_plus,
            Noise(options.dropout, options.neftune),
            options.remat,
            options.dtype == "float16",
        )
        self.step = make_step(config, method.loss, self._optimizer, step_options, self._mesh, machine)
        self._evaluate = make_evaluation(config, method.loss, self._mesh, machine)
        self._weights = self._everywhere(weights)
        self._start = start
        self._reference = self._everywhere(start) if method.reference == "start" else None
        self._key = self._everywhere(jax.random.key(options.seed))
        self._checkpoints = Checkpoints(folder.checkpoints, options.keep_checkpoints, lambda line: self._say(line))
        self._saved_at = (0, time.monotonic())
        self._signal: int | None = None
        self._compiled: set[int] = set()

    def run(self) -> Outcome:
        """Trains to the end, from the newest checkpoint if there is one.

        Raises:
            Interrupted: SIGTERM or SIGINT; the state is saved.
            TrainingStopped: the loss is not a number.
        """
        at = self._position()
        self._folder.forget_after(at.done or -1)
        with Display(self.total_steps, at.done, self._folder.path) as display, self._signals():
            self._say = display.say
            if at.done == 0 and self._options.eval_first:
                self._judge(at, display)
            saved = at.done
            while not at.ended:
                at.state, entry = self._one_step(at.done, at.state)
                at.done += 1
                at.ended = at.done == self.total_steps
                if at.ended or at.done % self._options.log_every == 0:
                    self._folder.log(entry)
                display.step(entry)
                if at.ended or at.done % self._eval_every == 0:
                    self._judge(at, display)
                if at.ended or self._signal or self._is_time_to_save(at.done):
                    if self._checkpoints.save(at.done, at.arrays, at.facts):
                        saved = at.done
                    self._saved_at = (at.done, time.monotonic())
                if self._signal and not at.ended:
                    raise Interrupted(self._signal, at.done, saved)
        draw(self._folder.metrics(), self._folder.path / "loss.png")
        if self._options.early_stop:
            return Outcome(at.best, at.best_step, at.best_scores)
        return Outcome(at.state.adapter, at.done, at.scores)

    def _position(self) -> _Position:
        """The newest checkpoint, or the start."""
        # A copy: the first step gives its state away, and the start may be the reference.
        state = new_state(
            jax.tree.map(jnp.copy, self._start), self._optimizer, FIRST_SCALE if self._options.dtype == "float16" else 1.0
        )
        at = _Position(0, state, jax.device_get(self._start))
        saved = self._checkpoints.load(at.arrays)
        if saved:
            at = _Position(**saved.state, **saved.facts)
            self._say(f"going on from step {at.done} of {self.total_steps}")
        at.state = self._everywhere(at.state)
        self._saved_at = (at.done, time.monotonic())
        return at

    def _judge(self, at: _Position, display: Display) -> None:
        """Evaluates, and decides on stopping early."""
        if self._method.held_out is None:
            return
        at.scores = self.evaluate(at.state.adapter, self._method.held_out)
        entry = {"step": at.done, **at.scores}
        self._folder.log(entry)
        display.scores(entry)
        if at.scores["eval_loss"] < at.best_score:
            at.best, at.best_score, at.best_step = jax.device_get(at.state.adapter), at.scores["eval_loss"], at.done
            at.best_scores, at.worse = at.scores, 0
        else:
            at.worse += 1
        if self._options.early_stop and at.worse >= self._options.early_stop:
            at.ended = True

    def evaluate(self, adapter: Adapter | None, held_out: HeldOut) -> dict[str, float]:
        """`eval_loss`, `eval_<metric>` of the loss, and the further scores, of an adapter (None: the base model)."""
        adapter, sums = self._everywhere(adapter), None
        for window in held_out.windows():
            terms = jax.device_get(self._evaluate(adapter, self._weights, self._reference, self._placed(window)))
            # In float64: over a large set, sums in float32 lose what they add.
            terms = jax.tree.map(np.float64, terms)
            sums = terms if sums is None else jax.tree.map(np.add, sums, terms)
        found = {}
        if sums is not None:  # a method that samples has no windows, and its `scores` tell everything
            found = {"eval_loss": float(sums.total / max(sums.count, 1e-30))}
            found |= {f"eval_{name}": float(total / max(count, 1e-30)) for name, (total, count) in sums.metrics.items()}
        return found | dict(self._held_out_scores(adapter))

    def _one_step(self, done: int, state: State) -> tuple[State, dict[str, Any]]:
        started = time.monotonic()
        window = self._method.source.window(done, state.adapter)
        facts = dict(self._method.source.start_metrics(done))
        tokens, scale = facts.pop("tokens", None), float(state.scale)
        length = max(array.shape[2] for array in window.values() if array.ndim > 2)
        if length not in self._compiled:
            self._compiled.add(length)
            self._say(f"compiling the step for examples of {length} tokens, once (up to half a minute)")
        rate = self._rate(done)
        state = state.replace(optimizer={path: at_rate(each, rate) for path, each in state.optimizer.items()})
        state, report = self.step(state, self._weights, self._reference, self._placed(window), self._key)
        report = jax.device_get(report)
        if not report.finite and (self._options.dtype != "float16" or scale <= 1):
            lines = ", ".join(map(str, self._method.source.lines(done)))
            raise TrainingStopped(
                f"step {done + 1}: the loss is {report.loss:g} and the gradient's norm {report.grad_norm:g}, on lines {lines} of"
                f" {self._options.data}; the last good checkpoint stays. Look at these lines, or start over with a lower --lr"
                f" (--restart)"
            )
        entry = {
            "step": done + 1,
            "loss": float(report.loss),
            "grad_norm": float(report.grad_norm),
            "lr": rate,
            "count": float(report.count),
        }
        if self._options.dtype == "float16":
            entry |= {"loss_scale": float(report.scale), "skipped": int(not report.finite)}
        if tokens:
            entry["tokens_per_second"] = tokens / (time.monotonic() - started)
        return state, entry | {name: float(value) for name, value in report.metrics.items()} | facts

    def _rate(self, done: int) -> float:
        return float(self._schedule(done))

    @property
    def _eval_every(self) -> int:
        return self._options.eval_every or max(1, math.ceil(self._method.source.steps_per_epoch))

    def _is_time_to_save(self, done: int) -> bool:
        step, at = self._saved_at
        return done - step >= self._options.checkpoint_every or time.monotonic() - at >= 60 * self._options.checkpoint_minutes

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Lets the current step finish when the process is asked to end; asked again, it ends at once."""

        def remember(number: int, frame: Any) -> None:
            self._signal = number
            for each, handler in before.items():
                signal.signal(each, handler)
            self._say("stopping after this step; once more stops at once, and the same command then goes on from the last checkpoint")

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, remember)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _everywhere(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self._mesh, P())) if self._mesh else jax.tree.map(jnp.asarray, tree)

    def _placed(self, window: Window) -> dict[str, Array]:
        return jax.device_put(dict(window), NamedSharding(self._mesh, P(None, AXIS)) if self._mesh else None)


def _mesh(micro_batch: int) -> Mesh | None:
    """All local devices that share a micro-batch evenly; None for one."""
    devices = jax.local_devices()
    count = max(count for count in range(1, len(devices) + 1) if micro_batch % count == 0)
    return Mesh(np.array(devices[:count]), (AXIS,)) if count > 1 else None
