"""The client of a server, over gRPC.

Each request is a `ModelStreamInfer` call of its own on one shared connection. Triton's streams can carry many requests, but an
error on a stream does not say which request it belongs to, and a stream can only be cancelled as a whole. HTTP/2 multiplexes the
calls anyway: with 16 streams at once, a call each was as fast as one shared stream.
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from client import errors, wire
from client.answers import Chunk
from client.interface import LanguageModel, Responses
from jaxlora.errors import ServingError


class Client(LanguageModel):
    """A client of the server at `url`; connects with the first call.

    Arguments:
        url: `host:port` of the server's gRPC endpoint.
        model: which model answers. With `jax_lora`, closing a stream stops its generation on the server at once. `llm` is the
            front door of ordinary clients, an ensemble: it gives the same answers, but generates them to their end.
        headers: metadata for every call, for example the key of a protocol that the server restricts.
    """

    def __init__(self, url: str = wire.DEFAULT_URL, *, model: str = wire.DIRECT, headers: Mapping[str, str] | None = None):
        self.url = url
        self._model = model
        self._metadata = tuple((headers or {}).items())
        self._channel = grpc.insecure_channel(url, options=wire.channel_options(url))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def is_ready(self) -> bool:
        """Whether the server and its models are ready.

        Raises:
            ServerUnreachable: there is no server.
        """
        return self._call(self._stub.ServerReady, wire.pb.ServerReadyRequest(), errors.from_rpc).ready

    def load_adapters(self) -> None:
        self._call(self._stub.RepositoryModelLoad, wire.load_request(), errors.from_load)

    def close(self) -> None:
        self._channel.close()

    def _start(self, fields: Mapping[str, Any], timeout_s: float | None) -> Responses:
        request = wire.infer_request(self._model, fields, timeout_s)
        call = self._stub.ModelStreamInfer(iter((request,)), metadata=self._metadata, timeout=wire.deadline(timeout_s))
        return _Responses(call, self.url)

    def _query(self, query: bytes) -> bytes:
        return wire.catalogue_result(self._call(self._stub.ModelInfer, wire.catalogue_request(query), errors.from_rpc))

    def _call(self, method: Any, request: Any, error_of: Callable[[grpc.RpcError, str], ServingError]) -> Any:
        try:
            return method(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, self.url) from None


class _Responses:
    def __init__(self, call: Any, url: str):
        self._call, self._url = call, url

    def __next__(self) -> Chunk:
        try:
            response = next(self._call)
            chunk = None if response.error_message else Chunk.of(wire.outputs(response.infer_response))
            if chunk is None or chunk.end is not None:
                # To the end of the call as well: Triton 2.51 can lose track of a request that is cancelled while it ends, and
                # then waits for it when it is told to stop.
                collections.deque(self._call, maxlen=0)
        except grpc.RpcError as error:
            raise errors.from_rpc(error, self._url) from None
        if chunk is None:
            raise errors.from_text(response.error_message)
        return chunk

    def close(self) -> None:
        self._call.cancel()
