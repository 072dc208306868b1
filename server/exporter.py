"""Shows values in Triton's `/metrics`, through the custom metrics of the Python backend.

Must run in a process that does nothing else with Triton. When one of those calls returns, Triton still writes to the memory that the call
used and has already given back, so whatever the process sends or receives at that moment is corrupted (measured: a busy model dies within
seconds). One thread makes the calls, with a pause after each. A series can't be taken back, only a whole family.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from jaxlora.service.metrics import COUNTER, HISTOGRAM, INFO, METRICS, Distribution, Labels, Metric, Values

INTERVAL_S = 0.25
PAUSE_S = 0.002
ROUND_S = 0.5


class Exporter:
    """Brings Triton's metrics up to the values that `sync` is given. Counters must not fall.

    Arguments:
        pause_s: seconds after each of Triton's calls.
        round_s: seconds after which `sync` leaves what else histograms lack to the next call. Triton takes their values one by one, so
            they may fall behind where hundreds of requests end in a second; counters and gauges then don't.
    """

    def __init__(self, pause_s: float = PAUSE_S, round_s: float = ROUND_S):
        self._pause_s, self._round_s = pause_s, round_s
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, Labels], Any] = {}
        self._shown: dict[tuple[str, Labels], float] = {}
        self._replayed: dict[tuple[str, Labels], Distribution] = {}
        # What is still to be shown, the first of it first.
        self._due: dict[tuple[str, Labels], float] = {}
        self._behind: dict[tuple[str, Labels], Distribution] = {}

    def sync(self, news: Values) -> None:
        """Shows what is new, and goes on with what the calls before have left, also one that raised."""
        plain, distributions = news
        for name, series in plain.items():
            if METRICS[name].kind == INFO and series:
                self._due = {key: value for key, value in self._due.items() if key[0] != name}
            self._due |= {(name, labels): value for labels, value in series.items()}
        self._behind |= {(name, labels): found for name, series in distributions.items() for labels, found in series.items()}
        for (name, labels), value in list(self._due.items()):
            self._show(METRICS[name], labels, value)
            del self._due[name, labels]
        self._catch_up()

    def _show(self, metric: Metric, labels: Labels, value: float) -> None:
        key = (metric.name, labels)
        before = self._shown.get(key)
        if value == before:
            return
        if metric.kind == INFO and key not in self._series:
            self._take_back(metric.name)
        if metric.kind == COUNTER:
            self._at(metric, labels).increment(value - (before or 0))
        else:
            self._at(metric, labels).set(value)
        self._pause()
        self._shown[key] = value

    def _catch_up(self) -> None:
        until = time.monotonic() + self._round_s
        for name, labels in list(self._behind):
            found = self._behind[name, labels]
            in_time = self._replay(METRICS[name], labels, found, until)
            del self._behind[name, labels]
            if not in_time:
                self._behind[name, labels] = found  # behind the others
                return

    def _replay(self, metric: Metric, labels: Labels, found: Distribution, until: float) -> bool:
        """Observes what is new in each bucket as so many times its mean: counts are exact, and sums within rounding. False if there was
        not enough time."""
        shown = self._replayed.setdefault((metric.name, labels), Distribution([0] * len(found.counts), [0.0] * len(found.sums)))
        for bucket, count in enumerate(found.counts):
            new = count - shown.counts[bucket]
            value = (found.sums[bucket] - shown.sums[bucket]) / max(new, 1)
            for _ in range(new):
                self._at(metric, labels).observe(_inside(metric.buckets, bucket, value))
                self._pause()
                shown.counts[bucket] += 1
                shown.sums[bucket] += value
                if time.monotonic() >= until:
                    return False
        return True

    def _at(self, metric: Metric, labels: Labels) -> Any:
        key = (metric.name, labels)
        if key not in self._series:
            import triton_python_backend_utils as pb_utils

            kind = {COUNTER: pb_utils.MetricFamily.COUNTER, HISTOGRAM: pb_utils.MetricFamily.HISTOGRAM}.get(metric.kind, pb_utils.MetricFamily.GAUGE)
            if metric.name not in self._families:
                self._families[metric.name] = pb_utils.MetricFamily(name=metric.name, description=metric.help, kind=kind)
                self._pause()
            buckets = {"buckets": list(metric.buckets)} if metric.kind == HISTOGRAM else {}
            named = dict(zip(metric.labels, labels, strict=True))
            self._series[key] = self._families[metric.name].Metric(labels=named, **buckets)
            self._pause()
        return self._series[key]

    def _take_back(self, name: str) -> None:
        for key in [key for key in self._series if key[0] == name]:
            del self._series[key]
            self._shown.pop(key, None)
            self._pause()
        self._families.pop(name, None)
        self._pause()

    def close(self) -> None:
        """Takes everything back. Left to the end of the process, Triton's objects would crash it."""
        for name in list(self._families):
            self._take_back(name)

    def _pause(self) -> None:
        time.sleep(self._pause_s)


def _inside(buckets: tuple[float, ...], bucket: int, value: float) -> float:
    """A mean that rounding may have moved out of its bucket, put back."""
    return min(value, buckets[bucket]) if bucket < len(buckets) else value


class ExporterThread:
    """Shows some times a second what `changes` gives."""

    def __init__(self, changes: Callable[[], Values]):
        self._changes = changes
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Takes everything back and ends the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        exporter = Exporter()
        while not self._closing.wait(INTERVAL_S):
            try:
                exporter.sync(self._changes())
            except Exception as error:  # the next round may do better
                print(f"metrics could not be shown: {type(error).__name__}: {error}", flush=True)
        exporter.close()
