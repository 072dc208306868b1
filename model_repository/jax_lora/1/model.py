"""The `jax_lora` model: Triton on one side, `LoraService` on the other. Requests in, responses out, cancellation and errors."""

import functools
import pathlib
from typing import Any

from replies import Replies, Sender, Watcher

from jaxlora.adapters import AdapterVersion
from jaxlora.errors import EngineError, InvalidRequest
from jaxlora.service.fields import INPUT_IDS, merge_fields
from jaxlora.service.plan import Plan
from jaxlora.service.request_log import RequestLog
from jaxlora.service.service import LoraService
from server import backend, garbage, lifeline
from server.metrics_channel import Sender as MetricsSender


class TritonPythonModel:
    @backend.refusing
    def initialize(self, args: dict[str, str]) -> None:
        self.settings = backend.settings(args)
        store = pathlib.Path(args["model_repository"]).parent / "adapters"
        self.name = args["model_name"]
        log = RequestLog(self.settings.request_log)
        with garbage.kept_from_start():
            self.service = LoraService(self.settings, store, backend.progress, log=log, stopped=self._stopped, folder=backend.base_folder(self.settings))
        self.service.observer.registry.set("lora_engine_restarts", value=lifeline.restarts())
        self.sender, self.watcher = Sender(self.settings.stream_responses_per_s), Watcher()
        self.metrics = MetricsSender(self.service.observer.registry, self.service.state.record)
        self.lifeline = lifeline.Member(self._drain)

    def execute(self, requests: list[Any]) -> None:
        """Hands each request to the engine and returns at once: the answers come from the sender's thread."""
        for request in requests:
            response_sender = request.get_response_sender()
            try:
                checked, stream = self._check(request)
            except Exception as error:
                self.service.observer.refusals.record(error, request.request_id())
                backend.send_error(response_sender, error)
                continue
            timeout_s = request.timeout() / 1e6 or None
            start = functools.partial(self.service.start, timeout_s=timeout_s, request_id=request.request_id())
            replies = Replies(response_sender, self.sender, len(checked), stream)
            try:
                replies.start([functools.partial(start, row) for row in checked])
            except Exception as error:
                backend.send_error(response_sender, error)
                continue
            self.watcher.watch(replies)

    def finalize(self) -> None:
        self.service.close()
        self.watcher.close()
        self.sender.close()
        self.metrics.close()
        self.lifeline.close()

    def _drain(self) -> None:
        """Finishes what runs, and returns when every answer has been sent."""
        load = self.service.engine.load()
        if count := load["running"] + load["waiting"]:
            what = "1 request is" if count == 1 else f"{count} requests are"
            backend.progress(f"{what} being finished, for {self.settings.grace_s:g} s at most; a second Ctrl-C stops at once")
        self.service.drain()
        self.sender.close()

    def _stopped(self, error: EngineError) -> None:
        """The engine has stopped by itself: an unloaded model is not ready, and whoever watches starts it again."""
        self.lifeline.stopped(str(error))
        backend.unload(self.name)

    def _check(self, request: Any) -> tuple[list[tuple[Plan, AdapterVersion | None]], bool]:
        """The rows of a request, checked, and whether it streams."""
        parameters, rows = backend.parameters(request), backend.rows(request)
        prompts = [row.pop(INPUT_IDS.name, None) for row in rows]
        fields = [merge_fields(row, parameters, self.settings) for row in rows]
        stream = any(row.get("stream", False) for row in fields)
        if stream and len(rows) > 1:
            raise InvalidRequest({"stream": f"a streamed request holds 1 prompt, this one holds {len(rows)}"})
        checked = [
            self.service.check(row, None if prompt is None else _unpadded(prompt)) for row, prompt in zip(fields, prompts, strict=True)
        ]
        return checked, stream


def _unpadded(ids: list[int]) -> list[int]:
    """Token ids without the -1 that the tokenizer model fills the ends of short rows with."""
    end = len(ids)
    while end and ids[end - 1] == -1:
        end -= 1
    return ids[:end]
