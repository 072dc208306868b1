"""The `tokenizer` model: text or chat messages to token ids.

Checks every field of a request too, so that a client hears of all its mistakes at once and early. Imports no JAX: it starts quickly and
stays small.
"""

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from jaxlora.service.fields import INPUT_IDS, merge_fields
from jaxlora.service.metrics import Registry
from jaxlora.service.prompts import prompt_ids
from jaxlora.service.refusals import Refusals
from jaxlora.service.request_log import RequestLog
from jaxlora.text import Tokenizer
from server import backend
from server.metrics_channel import Sender

PADDING = -1


class TritonPythonModel:
    @backend.refusing
    def initialize(self, args: dict[str, str]) -> None:
        self.settings = backend.settings(args)
        self.tokenizer = Tokenizer.from_folder(backend.base_folder(self.settings))
        registry = Registry()
        self.log = RequestLog(self.settings.request_log)
        self.refusals, self.metrics = Refusals(registry, self.log), Sender(registry)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        self.log.close()
        self.metrics.close()

    def _answer(self, request: Any) -> Any:
        try:
            parameters = backend.parameters(request)
            rows = [prompt_ids(self.tokenizer, merge_fields(row, parameters, self.settings)) for row in backend.rows(request)]
        except Exception as error:
            self.refusals.record(error, request.request_id())
            return backend.error_response(error)
        ids = np.full((len(rows), max(map(len, rows))), PADDING, np.int32)
        for row, values in enumerate(rows):
            ids[row, : len(values)] = values
        return pb_utils.InferenceResponse([pb_utils.Tensor(INPUT_IDS.name, ids)])
