"""The `adapters` model: loading it publishes what is new in the store, inference answers what is being served. Imports no JAX."""

import os
import pathlib
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from jaxlora.adapters import CatalogueReader, catalogue_path, refresh
from jaxlora.adapters.query import answer
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterInvalid
from jaxlora.peft import Limits
from jaxlora.service.metrics import Registry
from server import backend, watched
from server.metrics_channel import Sender


class TritonPythonModel:
    @backend.refusing
    def initialize(self, args: dict[str, str]) -> None:
        settings = backend.settings(args)
        base = ModelConfig.from_folder(backend.base_folder(settings))
        store = pathlib.Path(args["model_repository"])
        (store / "users").mkdir(exist_ok=True)
        catalogue = catalogue_path(settings.cache_dir, store)
        report = refresh(store, catalogue, base, Limits.of(settings), _server())
        watched.outrun(store)
        for line in report.lines():
            print(f"adapters: {line}", flush=True)
        registry = Registry()
        registry.add("lora_publishes_total", "accepted", amount=len(report.added))
        registry.add("lora_publishes_total", "refused", amount=len(report.rejected))
        self._metrics = Sender(registry)
        if report.rejected and not report.first:
            self._metrics.close()
            raise AdapterInvalid(report.problems())
        self._catalogue = CatalogueReader(catalogue)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        self._metrics.close()

    def _answer(self, request: Any) -> Any:
        try:
            query = pb_utils.get_input_tensor_by_name(request, "query").as_numpy()
            result = answer(self._catalogue.current(), query.item())
        except Exception as error:
            return backend.error_response(error)
        return pb_utils.InferenceResponse([pb_utils.Tensor("result", np.array([result], dtype=object))])


def _server() -> str:
    """Names the server process that this one belongs to, differently after every restart."""
    pid = os.getppid()
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # Field 22 of proc(5), counted behind the command's name, which may hold anything.
    started = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{boot}:{pid}:{started}"
