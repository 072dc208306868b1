"""The `jax_lora` model: Triton on one side, `LoraService` on the other. Requests in, responses out, cancellation and errors."""

import functools
import pathlib
from typing import Any

from replies import Replies, Sender, Watcher

from jaxlora.errors import InvalidRequest
from jaxlora.service.fields import INPUT_IDS, merge_fields
from jaxlora.service.service import LoraService
from server import backend


class TritonPythonModel:
    @backend.refusing
    def initialize(self, args: dict[str, str]) -> None:
        self.settings = backend.settings(args)
        store = pathlib.Path(args["model_repository"]).parent / "adapters"
        self.service = LoraService(self.settings, store, backend.progress)
        self.sender, self.watcher = Sender(), Watcher()

    def execute(self, requests: list[Any]) -> None:
        """Hands each request to the engine and returns at once: the answers come from the sender's thread."""
        for request in requests:
            response_sender = request.get_response_sender()
            try:
                self._start(request, response_sender)
            except Exception as error:
                backend.send_error(response_sender, error)

    def finalize(self) -> None:
        self.service.close()
        self.watcher.close()
        self.sender.close()

    def _start(self, request: Any, response_sender: Any) -> None:
        parameters, rows = backend.parameters(request), backend.rows(request)
        prompts = [row.pop(INPUT_IDS.name, None) for row in rows]
        fields = [merge_fields(row, parameters, self.settings) for row in rows]
        stream = any(row.get("stream", False) for row in fields)
        if stream and len(rows) > 1:
            raise InvalidRequest({"stream": f"a streamed request holds 1 prompt, this one holds {len(rows)}"})
        checked = [
            self.service.check(row, None if prompt is None else _unpadded(prompt)) for row, prompt in zip(fields, prompts, strict=True)
        ]
        timeout_s = request.timeout() / 1e6 or None
        replies = Replies(response_sender, self.sender, len(rows), stream)
        replies.start([functools.partial(self.service.start, row, timeout_s=timeout_s) for row in checked])
        self.watcher.watch(replies)


def _unpadded(ids: list[int]) -> list[int]:
    """Token ids without the -1 that the tokenizer model fills the ends of short rows with."""
    end = len(ids)
    while end and ids[end - 1] == -1:
        end -= 1
    return ids[:end]
