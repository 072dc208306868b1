"""The scheduler: admits requests to slots, reads their prompts chunk by chunk, and decodes all running rows together.

One thread owns the device. A step reads parts of prompts, together no more than a full prefill chunk, and computes the next token of
all others; where the backend can't do both in one step, one follows the other. So prompts never stall the others for longer than a chunk
takes. Who gets a slot, and whose prompt is read on, is for the `FairQueue` to say; a request that waits for its adapter does not hold
back those behind it.
"""

import logging
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future

import numpy as np

from jaxlora.engine.closing import Closing
from jaxlora.engine.fair_queue import FairQueue
from jaxlora.engine.health import Health, Thresholds
from jaxlora.engine.limits import Limits
from jaxlora.engine.prefixes import Prefixes
from jaxlora.engine.program import Program
from jaxlora.engine.requests import Handle, Request
from jaxlora.engine.residency import HostAdapter, Residency
from jaxlora.engine.slots import Sequence, token_of
from jaxlora.engine.stepper import Outcome, Stepper, cause_of
from jaxlora.errors import Cancelled, EngineError, RequestTimeout, ServingError

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over the slots of a `Program`.

    Arguments:
        program: warmed up; the engine's thread is the only one that uses it from now on.
        read_adapter: the future of an adapter in host memory for a request's adapter key.
        placed: told of every adapter that came onto the device, how many seconds after it was first waited for.
        health: told of faults and delays; refuses requests where its breakers are open.
        relieve: gives host memory back that can be done without; called where memory runs out.
        stopped: told why, after the engine's thread ended by itself and whoever waited has been told.
    """

    def __init__(
        self,
        program: Program,
        read_adapter: Callable[[Hashable], "Future[HostAdapter]"],
        limits: Limits = Limits(),
        placed: Callable[[float], None] = lambda seconds: None,
        health: Health | None = None,
        relieve: Callable[[], None] = lambda: None,
        stopped: Callable[[EngineError], None] = lambda error: None,
    ):
        self._program, self._limits, self._stopped = program, limits, stopped
        self.health = health or Health(Thresholds(), program.sizes.slots)
        self._stepper = Stepper(program, self.health, self._begin_anew, relieve)
        self._residency = Residency(program, self._stepper.put_adapter, read_adapter, self._wake, placed)
        self._wakeup = threading.Condition()
        self._woken = False
        self._queue = FairQueue(program.sizes.slots, program.sizes.max_seq_len, limits)
        self._slots: list[Sequence | None] = [None] * program.sizes.slots
        self._closing = Closing()
        self._prefixes = Prefixes.of(program, limits.prefix_cache)
        self._expected = False  # whether somebody waits for an adapter only
        self.reused = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        """Queues a request. Its sink hears of everything that follows.

        Raises:
            Unavailable: a limit is reached, a breaker is open, or the engine has stopped.
        """
        sequence = Sequence(request, time.monotonic())
        with self._wakeup:
            self._closing.check()
            self.health.check(request.adapter)
            self._queue.add(sequence)
            if request.adapter is not None and len(self._queue) <= self._slots.count(None):
                self._residency.expect(request.adapter)
            self._woken = True
            self._wakeup.notify()
        return Handle(sequence.cancelled, self._wake)

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive() and self._closing.error is None

    def load(self) -> dict[str, int]:
        """What is going on: requests waiting and running, tokens in the KV cache that belong to running requests, adapters on the device,
        and counters since the start."""
        running = self._present()
        with self._wakeup:
            waiting = len(self._queue)
        return {
            "waiting": waiting, "running": len(running), "steps": self._stepper.steps, "kv_tokens": sum(sequence.written for sequence in running),
            "adapters_resident": len(self._residency.resident()), "adapters_placed": self._residency.placed,
            "adapters_evicted": self._residency.evicted, "compiled": self._program.compiled(),
            "prompt_tokens_reused": self.reused, "guessed": self._stepper.guessed, "guessed_right": self._stepper.guessed_right,
        }

    def adapters(self) -> list[Hashable]:
        """The keys of the adapters on the device."""
        return self._residency.resident()

    def stop(self, grace_s: float = 0.0) -> None:
        """Takes no more requests, and ends the thread when those that there are have ended, or after `grace_s` seconds: what has not
        finished by then fails as `Unavailable`."""
        with self._wakeup:
            self._closing.begin(grace_s)
        self._wake()
        self._thread.join()
        self._residency.close()

    def _wake(self) -> None:
        with self._wakeup:
            self._woken = True
            self._wakeup.notify()

    def _run(self) -> None:
        try:
            while not self._closing.is_over(lambda: not self._unfinished()):
                self._rest()
                self._drop_ended()
                self._advance()
        except Exception as error:  # whatever it is, nobody may be left waiting
            log.exception("the engine stopped")
            with self._wakeup:
                self._closing.error = EngineError(f"the engine stopped: {cause_of(error)}")
        left = self._unfinished()
        for sequence in left:
            self._fail(sequence, self._closing.failure())
        if self._closing.error is not None:
            self._stopped(self._closing.error)
        for sequence in left:
            self._leave(sequence, intact=self._closing.error is None)

    def _rest(self) -> None:
        """Sleeps while there is nothing to do."""
        with self._wakeup:
            if not self._woken and not any(self._slots):
                self._wakeup.wait(self._patience())
            self._woken = False

    def _patience(self) -> float | None:
        first = min((sequence.deadline(self._limits.queue_timeout_s) for sequence in self._queue), default=None)
        return None if first is None else max(0.0, min(first - time.monotonic(), self._closing.left_s()))

    def _unfinished(self) -> list[Sequence]:
        with self._wakeup:
            return [*self._queue, *self._present()]

    def _present(self) -> list[Sequence]:
        """Those that have a slot."""
        return [sequence for sequence in list(self._slots) if sequence is not None]

    def _drop_ended(self) -> None:
        now = time.monotonic()
        for sequence in self._unfinished():
            if sequence.cancelled.is_set():
                self._end(sequence, Cancelled("the request was cancelled"))
            elif now >= sequence.deadline(self._limits.queue_timeout_s):
                self._end(sequence, self._timeout(sequence, now))

    def _admit(self) -> None:
        on_their_way: set[Hashable] = set()
        while (sequence := self._first(on_their_way)) is not None:
            key = sequence.request.adapter
            if (ending := self._read_to_end()) and self._prefixes.is_coming(key, sequence.request.prompt, ending):
                break  # a step later it has less to read
            try:
                bank_slot = -1 if key is None else self._residency.try_acquire(key)
            except ServingError as error:
                self.health.adapter_failed(key, error)
                self._end(sequence, error)
                continue
            if bank_slot is None:
                on_their_way.add(key)
                continue
            sequence.bank_slot = bank_slot
            self._place(sequence)
            sequence.started = time.monotonic()
            self.health.waited(sequence.started - sequence.submitted)
            with self._wakeup:
                self._queue.start(sequence)
            self._tell(sequence.request.started)
        self._expected = bool(on_their_way)

    def _first(self, passed: set[Hashable]) -> Sequence | None:
        if len(self._slots) - self._slots.count(None) >= self.health.allowed_rows():
            return None
        with self._wakeup:
            return self._queue.first(passed)

    def _read_to_end(self) -> list[Sequence]:
        """Those whose prompts the coming step reads to their end."""
        return [sequence for sequence in self._present() if sequence.part and not sequence.left]

    def _place(self, sequence: Sequence) -> None:
        """Gives a sequence a slot, and what is known of its prompt already."""
        request = sequence.request
        place = self._prefixes.place(request.adapter, request.prompt, [slot for slot, user in enumerate(self._slots) if user is None])
        self._prefixes.forget(place.slot)
        tokens = np.asarray(request.prompt[: place.length], np.int32)
        if self._stepper.reuse(place.source, place.slot, tokens, request.params.penalised):
            sequence.written = sequence.cached = place.length
            self.reused += place.length
        sequence.slot = place.slot
        self._slots[place.slot] = sequence

    def _advance(self) -> None:
        """Every sequence by one step, or as much as there is room for."""
        before = self._stepper.steps
        if self._program.prefill_rows > 1:
            self._share_out()
        else:
            self._read_one()
        sequences = [sequence for sequence in self._present() if sequence.part or not sequence.prefilling]
        self._step(sorted(sequences, key=lambda sequence: not sequence.part))
        self.health.stepped(self._stepper.steps - before)

    def _share_out(self) -> None:
        """Says what the next step reads of which prompts beside the answers: the next part of a long one, or several short ones."""
        room = self._program.sizes.prefill_chunk
        while room > 0 and (sequence := self._next_prompt()) is not None:
            sequence.part = min(room, sequence.left)
            room -= sequence.part

    def _read_one(self) -> None:
        """A step that reads the next part of one prompt, and nothing else."""
        if (sequence := self._next_prompt()) is not None:
            sequence.part = min(self._program.sizes.prefill_chunk, sequence.left)
            self._step([sequence])
            self._admit()  # whoever came meanwhile

    def _next_prompt(self) -> Sequence | None:
        self._admit()
        unread = [sequence for sequence in self._present() if sequence.left]
        with self._wakeup:
            return self._queue.next_prompt(unread) if unread else None

    def _step(self, sequences: list[Sequence]) -> None:
        if not sequences:
            return
        expected = self._expected or any(sequence.left for sequence in self._present())
        for outcome in self._stepper.run(sequences, expected):
            sequence = outcome.sequence
            if outcome.error is not None:
                self._end(sequence, outcome.error)
                continue
            sequence.written, sequence.part = sequence.written + outcome.length, 0
            if not sequence.prefilling:
                if not sequence.answer:
                    self._prefixes.hold(sequence)
                self._emit(sequence, outcome)

    def _begin_anew(self, suspects: list[Sequence]) -> None:
        """The slots' caches are lost."""
        self._prefixes.forget_all()
        for sequence in self._present():
            sequence.begin_anew(suspect=sequence in suspects)

    def _emit(self, sequence: Sequence, outcome: Outcome) -> None:
        """Hands a new token out, and ends the answer where it ends."""
        params, now = sequence.request.params, time.monotonic()
        token = token_of(outcome.sampled, outcome.row, outcome.index, params.logprobs)
        sequence.answer.append(token.id)
        if len(sequence.answer) <= sequence.handed_out:
            return
        if not sequence.handed_out:
            sequence.first_token = now
        sequence.handed_out, sequence.suspect = len(sequence.answer), False
        full = len(sequence.request.prompt) + len(sequence.answer) >= self._program.sizes.max_seq_len
        if token.id in params.stop_token_ids:
            reason = "stop"
        else:
            try:
                stopped = sequence.request.sink.token(token)
            except Exception as error:
                log.exception("a sink raised")
                self._end(sequence, EngineError(f"the answer could not be delivered: {error}"))
                return
            reason = "stop" if stopped else "length" if full or len(sequence.answer) >= params.max_tokens else None
        if reason is not None:
            self._leave(sequence)
            self.health.adapter_succeeded(sequence.request.adapter)
            self._tell(lambda: sequence.request.sink.finish(sequence.result(reason, now)))

    def _end(self, sequence: Sequence, error: ServingError) -> None:
        self._leave(sequence, intact=not isinstance(error, EngineError))
        self._fail(sequence, error)

    def _leave(self, sequence: Sequence, intact: bool = True) -> None:
        sequence.ended = True
        adapter = sequence.request.adapter
        with self._wakeup:
            self._queue.end(sequence)
            if sequence.slot < 0 and all(other.request.adapter != adapter for other in self._queue):
                self._residency.give_up(adapter)
        if sequence.slot >= 0:
            self._slots[sequence.slot] = None
            if intact:
                self._prefixes.hold(sequence)
            else:
                self._prefixes.forget(sequence.slot)
            # Without it, those who wait would sleep on if all running rows end in the same step.
            self._woken = True
            if adapter is not None:
                self._residency.release(adapter)

    def _timeout(self, sequence: Sequence, now: float) -> RequestTimeout:
        waits, own, waited = sequence.slot < 0, sequence.request.timeout_s, now - sequence.submitted
        if own is not None and waited >= own:
            text = f"the request's time-out of {own:g} s passed {'in the queue' if waits else f'after {len(sequence.answer)} tokens'}"
        else:
            text = f"no slot came free in {waited:.1f} s; the limit is {self._limits.queue_timeout_s:g} s (QUEUE_TIMEOUT_S)"
        with self._wakeup:
            return RequestTimeout(text, self._queue.wait_s(len(self._queue)) if waits else None)

    def _fail(self, sequence: Sequence, error: ServingError) -> None:
        self._tell(lambda: sequence.request.sink.fail(error))

    @staticmethod
    def _tell(call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            log.exception("a sink raised")
