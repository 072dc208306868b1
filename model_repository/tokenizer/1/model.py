"""The `tokenizer` model: text or chat messages to token ids.

Checks every field of a request too, so that a client hears of all its mistakes at once and early. Imports no JAX: it starts quickly and
stays small.
"""

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from jaxlora.checkpoint import resolve
from jaxlora.service.fields import INPUT_IDS, merge_fields
from jaxlora.service.prompts import prompt_ids
from jaxlora.text import Tokenizer
from server import backend

PADDING = -1


class TritonPythonModel:
    @backend.refusing
    def initialize(self, args: dict[str, str]) -> None:
        self.settings = backend.settings(args)
        self.tokenizer = Tokenizer.from_folder(resolve(self.settings.model, self.settings.cache_dir, backend.progress))

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            parameters = backend.parameters(request)
            rows = [prompt_ids(self.tokenizer, merge_fields(row, parameters, self.settings)) for row in backend.rows(request)]
        except Exception as error:
            return backend.error_response(error)
        ids = np.full((len(rows), max(map(len, rows))), PADDING, np.int32)
        for row, values in enumerate(rows):
            ids[row, : len(values)] = values
        return pb_utils.InferenceResponse([pb_utils.Tensor(INPUT_IDS.name, ids)])
