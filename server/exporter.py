"""Shows a registry in Triton's `/metrics`, through the custom metrics of the Python backend.

Those are not thread-safe: an exporter belongs to one thread, and a process has one. Several processes may show the same metric; Triton
adds their counts up, and goes on from what it has when a process ends. A series can't be taken back, only a whole family.
"""

import threading
from collections.abc import Callable
from typing import Any

from jaxlora.service.metrics import COUNTER, HISTOGRAM, INFO, METRICS, Distribution, Labels, Metric, Registry

INTERVAL_S = 0.25


class Exporter:
    """Brings Triton's metrics up to what the registry holds, whenever `sync` is called."""

    def __init__(self, registry: Registry):
        self._registry = registry
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, Labels], Any] = {}
        self._shown: dict[tuple[str, Labels], float | Distribution] = {}

    def sync(self) -> None:
        """Shows all that has changed since the last call."""
        values, distributions = self._registry.read()
        for name, series in values.items():
            metric = METRICS[name]
            for labels, value in series.items():
                if metric.kind == INFO and (name, labels) not in self._series:
                    self._take_back(name)
                self._show(metric, labels, value)
        for name, series in distributions.items():
            for labels, found in series.items():
                self._replay(METRICS[name], labels, found)

    def _show(self, metric: Metric, labels: Labels, value: float) -> None:
        key = (metric.name, labels)
        before = self._shown.get(key)
        if value == before:
            return
        if metric.kind == COUNTER:
            self._at(metric, labels).increment(value - (before or 0))
        else:
            self._at(metric, labels).set(value)
        self._shown[key] = value

    def _replay(self, metric: Metric, labels: Labels, found: Distribution) -> None:
        """Observes what is new in each bucket as so many times its mean: counts are exact, and sums within rounding."""
        key = (metric.name, labels)
        before = self._shown.get(key) or Distribution([0] * len(found.counts), [0.0] * len(found.sums))
        for bucket, count in enumerate(found.counts):
            new = count - before.counts[bucket]
            if new:
                value = (found.sums[bucket] - before.sums[bucket]) / new
                for _ in range(new):
                    self._at(metric, labels).observe(_inside(metric.buckets, bucket, value))
        self._shown[key] = found

    def _at(self, metric: Metric, labels: Labels) -> Any:
        key = (metric.name, labels)
        if key not in self._series:
            import triton_python_backend_utils as pb_utils

            kind = {COUNTER: pb_utils.MetricFamily.COUNTER, HISTOGRAM: pb_utils.MetricFamily.HISTOGRAM}.get(metric.kind, pb_utils.MetricFamily.GAUGE)
            if metric.name not in self._families:
                self._families[metric.name] = pb_utils.MetricFamily(name=metric.name, description=metric.help, kind=kind)
            buckets = {"buckets": list(metric.buckets)} if metric.kind == HISTOGRAM else {}
            named = dict(zip(metric.labels, labels, strict=True))
            self._series[key] = self._families[metric.name].Metric(labels=named, **buckets)
        return self._series[key]

    def _take_back(self, name: str) -> None:
        for key in [key for key in self._series if key[0] == name]:
            del self._series[key], self._shown[key]
        self._families.pop(name, None)


def _inside(buckets: tuple[float, ...], bucket: int, value: float) -> float:
    """A mean that rounding may have moved out of its bucket, put back."""
    return min(value, buckets[bucket]) if bucket < len(buckets) else value


class ExporterThread:
    """Syncs a registry some times a second, after `record` has brought it up to date."""

    def __init__(self, registry: Registry, record: Callable[[], None]):
        self._registry, self._record = registry, record
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Syncs once more, then ends the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        exporter, closing = Exporter(self._registry), False
        while not closing:
            closing = self._closing.wait(INTERVAL_S)
            try:
                self._record()
                exporter.sync()
            except Exception as error:  # metrics must never end the service; the next round may do better
                print(f"metrics could not be shown: {type(error).__name__}: {error}", flush=True)
