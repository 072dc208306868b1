"""This project's server as people meet it: a Triton of its own, text to the `llm` model over gRPC, answers streamed.

Each request is a `ModelStreamInfer` call of its own on one connection, as the project's client sends them. Responses are noted as they
arrive and read afterwards, so that the load generator takes little from the server, with which it shares the machine.
"""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from bench.load import closed_loop, stamped
from bench.worker import Answer, Request, serve
from client import wire
from client.requests import fields_of
from jaxlora.settings import Settings
from server import preflight
from server.launch import TritonServer

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
START_TIMEOUT_S = 600


class TritonDriver:
    def __init__(self) -> None:
        self._server: TritonServer | None = None
        self.stream = True

    def start(self, setup: dict[str, Any]) -> dict[str, Any]:
        ports = dict(zip(preflight.PORTS, preflight.free_ports(len(preflight.PORTS)), strict=True))
        settings = dataclasses.replace(Settings.read(setup["environment"]), **ports)
        begin = time.monotonic()
        self._server = TritonServer(settings, model_repository=pathlib.Path(setup["repository"]), base_folder=pathlib.Path(setup["model"]))
        self._server.start()
        self._server.wait_until_ready(START_TIMEOUT_S)
        ready_s = time.monotonic() - begin
        return {"pid": self._server.pid, "ready_s": ready_s, "versions": {"triton": self._version()}}

    def run(self, requests: list[Request], concurrency: int) -> list[Answer]:
        return asyncio.run(self._run(requests, concurrency))

    def set_stream(self, stream: bool) -> None:
        """Whether answers are streamed from now on, or come in one piece."""
        self.stream = stream

    def address(self) -> str:
        """`host:port` of the server's gRPC endpoint."""
        return self._server.grpc_url

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()

    def _version(self) -> str:
        with grpc.insecure_channel(self._server.grpc_url) as channel:
            metadata = channel.unary_unary(
                "/inference.GRPCInferenceService/ServerMetadata",
                request_serializer=service_pb2.ServerMetadataRequest.SerializeToString,
                response_deserializer=service_pb2.ServerMetadataResponse.FromString,
            )
            return metadata(service_pb2.ServerMetadataRequest()).version

    async def _run(self, requests: list[Request], concurrency: int) -> list[Answer]:
        async with grpc.aio.insecure_channel(self._server.grpc_url, options=wire.channel_options(self._server.grpc_url)) as channel:
            call = channel.stream_stream(METHOD)  # bytes in, bytes out
            await channel.channel_ready()

            async def send(request: Request) -> Answer:
                message = self._message(request).SerializeToString()
                async with contextlib.aclosing(_responses(call, message)) as responses:
                    return _answer(*await stamped(responses))

            return await closed_loop(requests, concurrency, send)

    def _message(self, request: Request) -> service_pb2.ModelInferRequest:
        sampling = {"max_tokens": request.answer, "ignore_eos": True, **request.sampling}
        return wire.infer_request(wire.ENSEMBLE, fields_of(request.text, request.adapter or None, self.stream, sampling), None)


async def _responses(call: grpc.aio.StreamStreamMultiCallable, message: bytes) -> AsyncIterator[bytes]:
    async for response in call(iter((message,))):
        yield response


def _answer(sent: float, responses: list[tuple[float, bytes]]) -> Answer:
    """The responses read. Only the last one says how many tokens there were; each has its share of them by the length of its text."""
    texts, tokens = [], 0
    for arrived, raw in responses:
        response = service_pb2.ModelStreamInferResponse.FromString(raw)
        if response.error_message:
            raise RuntimeError(response.error_message)
        outputs = wire.outputs(response.infer_response)
        if not outputs:
            continue  # an empty final response
        if outputs.get("metrics"):
            tokens = json.loads(outputs["metrics"])["completion_tokens"]
            # A last response that only ends the answer carries no token of its own.
            if texts and not outputs["text_output"]:
                continue
        texts.append((arrived, len(outputs["text_output"])))
    return Answer(sent, by_text(texts, tokens), tokens)


def by_text(texts: list[tuple[float, int]], tokens: int) -> list[tuple[float, float]]:
    """(time, tokens) of each response of (time, length of its text): the first has one token, as streams begin, the rest have the rest."""
    (first, _), *others = texts
    if not others:
        return [(first, tokens)]
    whole = sum(length for _, length in others)
    return [(first, 1), *((time, (tokens - 1) * (length / whole if whole else 1 / len(others))) for time, length in others)]


if __name__ == "__main__":
    serve(TritonDriver())
