"""Reads a server's `/metrics` and computes from two readings what happened between them. Knows Prometheus' text format, shows nothing."""

import dataclasses
import http.client
import math
import time
import urllib.error
import urllib.request
from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families

from client.errors import ServerUnreachable
from client.proxies import is_local

Labels = frozenset[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Reading:
    """All samples at one time, in seconds of `time.monotonic`, by name and labels."""

    time: float
    samples: dict[str, dict[Labels, float]]

    def total(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels; 0 where there is none."""
        return sum(value for have, value in self.samples.get(name, {}).items() if labels.items() <= dict(have).items())

    def values(self, name: str, *labels: str) -> set[tuple[str, ...]]:
        """The values that these labels have in the series of a metric."""
        return {tuple(dict(have)[label] for label in labels) for have in self.samples.get(name, {})}


def parse(text: str, now: float) -> Reading:
    """A reading from Prometheus' text format."""
    samples: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return Reading(now, samples)


def read(url: str, timeout_s: float = 5) -> Reading:
    """Asks a server. Raises ServerUnreachable if none answers there."""
    try:
        with _opener(url).open(url, timeout=timeout_s) as answer:
            return parse(answer.read().decode(), time.monotonic())
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ServerUnreachable(f"no metrics at {url} ({reason})") from None


def _opener(url: str) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_local(url) else []))


@dataclasses.dataclass(frozen=True)
class Between:
    """What happened from one reading to a later one. A counter that fell was started anew, and counts from 0."""

    old: Reading
    new: Reading

    @property
    def seconds(self) -> float:
        return max(self.new.time - self.old.time, 1e-9)

    def rate(self, name: str, **labels: str) -> float:
        """How much a counter rose in a second."""
        return self._rise(name, labels) / self.seconds

    def quantile(self, share: float, name: str, **labels: str) -> float:
        """A quantile of a histogram's new values, as `histogram_quantile` computes it: linear within a bucket. NaN without values."""
        bounds = sorted(self.new.values(f"{name}_bucket", "le"), key=lambda bound: float(bound[0]))
        rises = [(float(bound), self._rise(f"{name}_bucket", {**labels, "le": bound})) for (bound,) in bounds]
        return _quantile(share, rises)

    def _rise(self, name: str, labels: dict[str, str]) -> float:
        new, old = self.new.total(name, **labels), self.old.total(name, **labels)
        return new - old if new >= old else new


def _quantile(share: float, cumulative: Iterable[tuple[float, float]]) -> float:
    cumulative = list(cumulative)
    if not cumulative or not cumulative[-1][1]:
        return math.nan
    rank, low, before = share * cumulative[-1][1], 0.0, 0.0
    for bound, count in cumulative:
        if count >= rank and count > before:
            return low if math.isinf(bound) else low + (bound - low) * (rank - before) / (count - before)
        low, before = bound, count
    return low
