"""The `metrics` model: what the other models count, in Triton's `/metrics`. A process of its own, see `server.exporter`. Imports no JAX."""

from typing import Any

from jaxlora.errors import InvalidRequest
from server import backend
from server.exporter import ExporterThread
from server.metrics_channel import Collector


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._collector = Collector()
        self._exporter = ExporterThread(self._collector.changes)

    def execute(self, requests: list[Any]) -> list[Any]:
        error = InvalidRequest({"nothing": "this model takes no requests; what it shows is in /metrics"})
        return [backend.error_response(error) for _ in requests]

    def finalize(self) -> None:
        self._exporter.close()
        self._collector.close()
