"""What the server counts and measures: one table of metrics, and a registry of their values.

Names, units and types follow Prometheus (https://prometheus.io/docs/practices/naming/): base units, `_total` for counters. Knows no
server that shows them: whoever does reads the registry. Imports no JAX. `python -m jaxlora.service.metrics` prints the table as Markdown.
"""

import bisect
import dataclasses
import threading
from collections.abc import Iterable, Mapping

COUNTER, GAUGE, HISTOGRAM, INFO = "counter", "gauge", "histogram", "info"

_WAITING_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_LOAD_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

Labels = tuple[str, ...]

BASE: Labels = ("base", "0")
OTHER: Labels = ("other", "")
UNKNOWN: Labels = ("unknown", "")
"""Values of `adapter` and `version` that no adapter can have, since a name has a slash: the base model; adapters past the bound; and
requests that were refused before it was known which adapter they are for."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric. `buckets` are the upper bounds of a histogram, ascending, without infinity.

    An `info` is a gauge that has one series at a time, and whose labels are the news.
    """

    name: str
    kind: str
    help: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()


_ADAPTER = ("adapter", "version")
_TABLE = (
    Metric("lora_requests_accepted_total", COUNTER, "Requests that were taken into the queue.", _ADAPTER),
    Metric(
        "lora_requests_total", COUNTER,
        "Requests that ended. outcome: finished (reason stop or length), failed, cancelled, or refused before the queue.",
        (*_ADAPTER, "outcome", "reason"),
    ),
    Metric("lora_prompt_tokens_total", COUNTER, "Prompt tokens of the requests that got a slot.", _ADAPTER),
    Metric("lora_prompt_tokens_reused_total", COUNTER, "Those of them that did not have to be computed, since a prompt began as another did."),
    Metric("lora_guessed_tokens_total", COUNTER, "Tokens that were guessed from the text so far (PROMPT_LOOKUP_TOKENS)."),
    Metric("lora_guessed_tokens_right_total", COUNTER, "Those of them that the model agreed with: each spares a step."),
    Metric("lora_generated_tokens_total", COUNTER, "Tokens generated.", _ADAPTER),
    Metric("lora_queue_time_seconds", HISTOGRAM, "From the request's arrival to its slot.", _ADAPTER, _WAITING_S),
    Metric("lora_time_to_first_token_seconds", HISTOGRAM, "From the request's arrival to its first token.", _ADAPTER, _WAITING_S),
    Metric("lora_time_per_output_token_seconds", HISTOGRAM, "Mean of a finished answer, its first token left out.", _ADAPTER, _TOKEN_S),
    Metric("lora_request_duration_seconds", HISTOGRAM, "From the arrival of a request that finished to its end.", _ADAPTER, _WHOLE_S),
    Metric("lora_requests_running", GAUGE, "Requests that have a slot."),
    Metric("lora_requests_waiting", GAUGE, "Requests that wait for a slot or for their adapter."),
    Metric("lora_adapter_requests_running", GAUGE, "Requests of one adapter version that have a slot.", _ADAPTER),
    Metric("lora_adapter_requests_waiting", GAUGE, "Requests of one adapter version that wait.", _ADAPTER),
    Metric("lora_load_ratio", GAUGE, "(Running + waiting) / slots: the number to scale a deployment by. Over 1, requests wait."),
    Metric("lora_slots", GAUGE, "Requests that can run at the same time (MAX_SLOTS), reserved slots aside."),
    Metric("lora_slots_used", GAUGE, "Slots in use."),
    Metric("lora_kv_tokens_used", GAUGE, "Tokens in the KV cache that belong to running requests."),
    Metric("lora_kv_tokens_capacity", GAUGE, "Tokens that the KV cache can hold: (MAX_SLOTS + RESERVED_SLOTS) x MAX_SEQ_LEN."),
    Metric("lora_kv_cache_usage_ratio", GAUGE, "Used share of the KV cache, 0 to 1."),
    Metric("lora_engine_up", GAUGE, "1 while the engine runs, 0 after it stopped on an error."),
    Metric("lora_engine_steps_total", COUNTER, "Decode steps."),
    Metric("lora_slots_allowed", GAUGE, "Slots that may be used, those in reserve too: fewer than there are for a time after memory ran out."),
    Metric(
        "lora_breaker_state", GAUGE,
        "0 closed, 1 half-open (some pass, to see how it goes), 2 open. breaker: latency, memory, adapter (the worst of all).", ("breaker",),
    ),
    Metric(
        "lora_faults_total", COUNTER,
        "Faults. place: prefill, decode, mixed (a prompt beside others in one step), adapter (placing one). kind: exception, out_of_memory, not_finite, state_lost (the KV cache).",
        ("place", "kind"),
    ),
    Metric("lora_engine_restarts", GAUGE, "Times that the server was started again because its engine had stopped."),
    Metric("lora_compiled_programs", GAUGE, "Programs compiled; constant after the start."),
    Metric("lora_adapters_resident", GAUGE, "Adapter versions on a tier: disk (can be served), host, device.", ("tier",)),
    Metric("lora_adapter_device_slots", GAUGE, "Adapters that fit on the device (LORA_SLOTS)."),
    Metric("lora_adapter_host_bytes", GAUGE, "Host memory that adapters take, up to ADAPTER_HOST_CACHE_BYTES."),
    Metric("lora_adapter_loads_total", COUNTER, "Adapters that came onto a tier: host, device.", ("tier",)),
    Metric("lora_adapter_load_failures_total", COUNTER, "Adapters that could not be read."),
    Metric("lora_adapter_evictions_total", COUNTER, "Adapters that had to leave a tier for another: host, device.", ("tier",)),
    Metric(
        "lora_adapter_load_seconds", HISTOGRAM, "host: reading one from disk. device: from the first request for it until it is there.",
        ("tier",), _LOAD_S,
    ),
    Metric("lora_publishes_total", COUNTER, "Adapter versions that a load of the store found, by outcome: accepted, refused.", ("outcome",)),
    # The most of it first: a scrape in between never shows more memory than that.
    Metric("lora_process_peak_memory_bytes", GAUGE, "The most memory that the process that holds the model has had."),
    Metric("lora_process_resident_memory_bytes", GAUGE, "Memory of the process that holds the model."),
    Metric("lora_device_peak_memory_bytes", GAUGE, "The most memory in use on a device; on a CPU by the process.", ("device",)),
    Metric("lora_device_memory_bytes", GAUGE, "Memory in use on a device; on a CPU that of the process.", ("device",)),
    Metric("lora_request_log_dropped_total", COUNTER, "Lines of the request log that were dropped because it could not be written in time."),
    # https://github.com/kubernetes-sigs/gateway-api-inference-extension, docs/proposals/003-model-server-protocol
    Metric(
        "lora_requests_info", INFO, "Adapters on the device and adapters waited for, as the Gateway API inference extension reads it.",
        ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    ),
)  # fmt: skip
METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}
_PLACES = {name: place for place, name in enumerate(METRICS)}


@dataclasses.dataclass
class Distribution:
    """Values of a histogram: for each bucket, the last one without a bound, how many fell into it and their sum."""

    counts: list[int]
    sums: list[float]

    def copy(self) -> "Distribution":
        return Distribution(list(self.counts), list(self.sums))


Values = tuple[dict[str, dict[Labels, float]], dict[str, dict[Labels, Distribution]]]
"""Counters, gauges and infos by name and labels, and histograms by name and labels."""


class Registry:
    """The values of all metrics, by labels. Any thread may call it; no call but `read` and `changes` takes longer than a few microseconds.
    A series begins with its first value."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[Labels, float]] = {metric.name: {} for metric in _TABLE if metric.kind != HISTOGRAM}
        self._distributions: dict[str, dict[Labels, Distribution]] = {metric.name: {} for metric in _TABLE if metric.kind == HISTOGRAM}
        self._changed: set[tuple[str, Labels]] = set()

    def add(self, name: str, *labels: str, amount: float = 1) -> None:
        """Counts up."""
        with self._lock:
            self._put(name, labels, self._values[name].get(labels, 0) + amount)

    def set(self, name: str, *labels: str, value: float) -> None:
        """A gauge's value, or the total of a counter that is counted elsewhere."""
        with self._lock:
            self._put(name, labels, value)

    def only(self, name: str, *labels: str, value: float) -> None:
        """The one series of an info."""
        with self._lock:
            self._put(name, labels, value)
            self._values[name] = {labels: value}

    def observe(self, name: str, *labels: str, value: float) -> None:
        """One more value of a histogram."""
        metric = METRICS[name]
        bucket = bisect.bisect_left(metric.buckets, value)
        with self._lock:
            series = self._distributions[name]
            found = series.get(labels)
            if found is None:
                _check(metric, labels)
                size = len(metric.buckets) + 1
                found = series[labels] = Distribution([0] * size, [0.0] * size)
            found.counts[bucket] += 1
            found.sums[bucket] += value
            self._changed.add((name, labels))

    def read(self) -> Values:
        """A copy of all values."""
        with self._lock:
            return {name: dict(series) for name, series in self._values.items()}, _copied(self._distributions)

    def changes(self) -> Values:
        """A copy of the values that have changed since the last call."""
        with self._lock:
            values, distributions = pick((self._values, self._distributions), self._changed)
            self._changed.clear()
            return values, _copied(distributions)

    def _put(self, name: str, labels: Labels, value: float) -> None:
        series = self._values[name]
        if labels not in series:
            _check(METRICS[name], labels)
        elif series[labels] == value:
            return
        series[labels] = value
        self._changed.add((name, labels))


def pick(values: Values, keys: Iterable[tuple[str, Labels]]) -> Values:
    """Those of the values that have these names and labels, in the order of the table."""
    picked: Values = ({}, {})
    for name, labels in sorted(keys, key=lambda key: _PLACES[key[0]]):
        for part, found in zip(values, picked, strict=True):
            if labels in part.get(name, {}):
                found.setdefault(name, {})[labels] = part[name][labels]
    return picked


def _copied(distributions: Mapping[str, Mapping[Labels, Distribution]]) -> dict[str, dict[Labels, Distribution]]:
    return {name: {labels: found.copy() for labels, found in series.items()} for name, series in distributions.items()}


def _check(metric: Metric, labels: Labels) -> None:
    if len(labels) != len(metric.labels):
        raise ValueError(f"{metric.name} has the labels {metric.labels}, got {labels}")


class BoundedLabels:
    """Keeps the number of series bounded: the first `limit` keys have labels of their own, all others share one. Any thread may call it.

    First come, first served, since Triton can't take a series back once it is there.
    """

    def __init__(self, limit: int, other: Labels):
        self._limit, self._other = limit, other
        self._known: set[Labels] = set()
        self._lock = threading.Lock()

    def __call__(self, labels: Labels) -> Labels:
        with self._lock:
            if labels in self._known:
                return labels
            if len(self._known) >= self._limit:
                return self._other
            self._known.add(labels)
            return labels


def markdown_table() -> str:
    """The metrics for the README."""
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in _TABLE:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(rows)


def zeros(values: Mapping[str, tuple[Labels, ...]], registry: Registry) -> None:
    """Lets series begin at 0, so that their first event shows as a rise."""
    for name, series in values.items():
        for labels in series:
            registry.add(name, *labels, amount=0)


if __name__ == "__main__":
    print(markdown_table())
