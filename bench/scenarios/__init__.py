"""What a table of streams does not show: many adapters, fairness, publishing, starting, repeated prompts, the wire, quality, training.

A scenario is a function from a `Context` to `{"title", "columns", "rows", "note"}` for the report, with its numbers beside.
"""

from collections.abc import Callable
from typing import Any

from bench.scenarios import cost, fairness, lookup, prefix, publishing, quality, starts, tiers, training, wire, zipf
from bench.scenarios.context import Context, Skipped

SCENARIOS: dict[str, Callable[[Context], dict[str, Any]]] = {
    "wire": wire.measure,
    "cost": cost.measure,
    "zipf": zipf.measure,
    "tiers": tiers.measure,
    "fairness": fairness.measure,
    "publish": publishing.measure,
    "starts": starts.measure,
    "prefix": prefix.measure,
    "lookup": lookup.measure,
    "quality": quality.measure,
    "training": training.measure,
}

__all__ = ["SCENARIOS", "Context", "Skipped"]
