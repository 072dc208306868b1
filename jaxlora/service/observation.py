"""What is recorded of each request: counts, times, and its line in the request log.

Stands between the engine and the sink of an answer, and changes nothing of either. Its part of the engine's thread is a few
microseconds a token and less than 0.1 ms a request.
"""

import collections
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxlora.adapters import AdapterVersion
from jaxlora.engine.requests import Result, Sink, Token
from jaxlora.errors import Cancelled, RequestTimeout, ServingError
from jaxlora.service.metrics import BASE, OTHER, BoundedLabels, Labels, Registry, zeros
from jaxlora.service.refusals import REFUSED, Refusals, now
from jaxlora.service.request_log import RequestLog

FINISHED, FAILED, CANCELLED = "finished", "failed", "cancelled"


class ObservedRequest:
    """The sink of one request, in front of the one that makes the answer."""

    def __init__(self, observer: "Observer", sink: Sink, prompt: tuple[int, ...], adapter: AdapterVersion | None, request_id: str):
        self._observer, self._sink, self._prompt, self._request_id = observer, sink, prompt, request_id
        self.adapter, self.labels = adapter, observer.labels(adapter)
        self._arrived = now()
        self._tokens = 0
        self._submitted = time.monotonic()
        self._first_token = math.nan
        self.started_at = math.nan

    @property
    def running(self) -> bool:
        return not math.isnan(self.started_at)

    def started(self) -> None:
        """It has got its slot."""
        self.started_at = time.monotonic()
        registry = self._observer.registry
        registry.observe("lora_queue_time_seconds", *self.labels, value=self.started_at - self._submitted)
        registry.add("lora_prompt_tokens_total", *self.labels, amount=len(self._prompt))

    def token(self, token: Token) -> bool:
        registry = self._observer.registry
        if not self._tokens:
            self._first_token = time.monotonic()
            registry.observe("lora_time_to_first_token_seconds", *self.labels, value=self._first_token - self._submitted)
        self._tokens += 1
        registry.add("lora_generated_tokens_total", *self.labels)
        return self._sink.token(token)

    def finish(self, result: Result) -> None:
        ended, registry = time.monotonic(), self._observer.registry
        unseen = result.completion_tokens - self._tokens  # a stop token is not handed out
        if unseen:
            registry.add("lora_generated_tokens_total", *self.labels, amount=unseen)
        if math.isnan(self._first_token):
            self._first_token = result.timings.first_token
            registry.observe("lora_time_to_first_token_seconds", *self.labels, value=self._first_token - self._submitted)
        self._tokens = result.completion_tokens
        if self._tokens > 1:
            each = (result.timings.finished - result.timings.first_token) / (self._tokens - 1)
            registry.observe("lora_time_per_output_token_seconds", *self.labels, value=each)
        registry.observe("lora_request_duration_seconds", *self.labels, value=ended - self._submitted)
        self._end(FINISHED, result.reason, ended)
        self._sink.finish(result)

    def refused(self, error: ServingError) -> None:
        """The engine did not take it; the sink hears nothing."""
        self._end(REFUSED, error.reason, time.monotonic(), error)

    def fail(self, error: ServingError) -> None:
        reason = f"queue_{error.reason}" if isinstance(error, RequestTimeout) and not self.running else error.reason
        self._end(CANCELLED if isinstance(error, Cancelled) else FAILED, reason, time.monotonic(), error)
        self._sink.fail(error)

    def _end(self, outcome: str, reason: str, ended: float, error: ServingError | None = None) -> None:
        self._observer.ended(self, outcome, reason)
        self._observer.log.write(lambda: self._line(outcome, reason, ended, error))

    def _line(self, outcome: str, reason: str, ended: float, error: ServingError | None) -> dict[str, Any]:
        describe = self._observer.describe_prompt
        times = {
            "queue_ms": self.started_at - self._submitted,
            "ttft_ms": self._first_token - self._submitted,
            "decode_ms": ended - self._first_token,
            "total_ms": ended - self._submitted,
        }
        return {
            "time": self._arrived,
            "request_id": self._request_id,
            "adapter": "" if self.adapter is None else self.adapter.name.unpinned,
            "version": 0 if self.adapter is None else self.adapter.version,
            "outcome": outcome,
            "reason": reason,
            **({} if error is None else {"error": str(error)}),
            "prompt_tokens": len(self._prompt),
            "completion_tokens": self._tokens,
            **{name: round(1000 * seconds, 3) for name, seconds in times.items() if not math.isnan(seconds)},
            **({} if describe is None else {"prompt": describe(self._prompt)}),
        }


class Observer:
    """Records every request of one service. Any thread may call it.

    Arguments:
        log: where the lines go.
        max_adapters: adapter versions that have label values of their own.
        describe_prompt: the text of a prompt's ids for the log, or None to leave it out. Called in the log's thread.
    """

    def __init__(
        self, registry: Registry, log: RequestLog, max_adapters: int, describe_prompt: Callable[[tuple[int, ...]], str] | None = None
    ):
        self.registry, self.log = registry, log
        self.refusals = Refusals(registry, log)
        self._bounded = BoundedLabels(max_adapters, OTHER)
        self.describe_prompt = describe_prompt
        self._active: set[ObservedRequest] = set()
        self._lock = threading.Lock()
        self._shown: set[Labels] = set()
        zeros(
            {
                "lora_requests_accepted_total": (BASE,),
                "lora_generated_tokens_total": (BASE,),
                "lora_prompt_tokens_total": (BASE,),
                "lora_adapter_loads_total": (("host",), ("device",)),
                "lora_adapter_evictions_total": (("host",), ("device",)),
                "lora_adapter_load_failures_total": ((),),
            },
            registry,
        )

    def observe(self, sink: Sink, prompt: tuple[int, ...], adapter: AdapterVersion | None, request_id: str) -> ObservedRequest:
        """The sink to give to the engine instead of `sink`; followed by `accepted` or its own `refused`."""
        observed = ObservedRequest(self, sink, prompt, adapter, request_id)
        with self._lock:
            self._active.add(observed)
        return observed

    def accepted(self, observed: ObservedRequest) -> None:
        """The request is in the engine's queue."""
        self.registry.add("lora_requests_accepted_total", *observed.labels)

    def ended(self, observed: ObservedRequest, outcome: str, reason: str) -> None:
        with self._lock:
            self._active.discard(observed)
        self.registry.add("lora_requests_total", *observed.labels, outcome, reason)

    def labels(self, adapter: AdapterVersion | None) -> Labels:
        """The values of the labels `adapter` and `version`."""
        return BASE if adapter is None else self._bounded((adapter.name.unpinned, str(adapter.version)))

    def load(self) -> Mapping[Labels, tuple[int, int]]:
        """Requests running and waiting by labels, those of all labels seen so far."""
        active = self._snapshot()
        running = collections.Counter(observed.labels for observed in active if observed.running)
        waiting = collections.Counter(observed.labels for observed in active if not observed.running)
        self._shown |= {BASE, *running, *waiting}
        return {labels: (running[labels], waiting[labels]) for labels in self._shown}

    def waiting_adapters(self) -> set[str]:
        """The adapters, without their versions, that requests wait for."""
        return {observed.adapter.name.unpinned for observed in self._snapshot() if observed.adapter is not None and not observed.running}

    def _snapshot(self) -> list[ObservedRequest]:
        with self._lock:
            return list(self._active)
