"""The client of a server for asyncio: the methods of `Client`, awaited. All tasks of one event loop may use it at once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Self, Unpack

import grpc
from tritonclient.grpc import service_pb2_grpc

from client import catalogue, errors, wire
from client.answers import Chunk, Completion, check_ended, joined
from client.requests import Message, Prompt, Sampling, fields_of
from jaxlora.errors import Cancelled, ServingError


class AsyncStream(AsyncIterator[Chunk]):
    """An answer on its way. `close`, the end of an `async with` block, dropping the object, and cancelling the task that waits
    for a chunk all cancel what has not come yet. Leaving an `async for` early does so once the object is dropped."""

    def __init__(self, call: grpc.aio.StreamStreamCall, url: str):
        self._call, self._url = call, url
        self._chunks: list[Chunk] = []
        self._responses = aiter(call)
        self._closed = False

    async def __anext__(self) -> Chunk:
        while not self._closed:
            try:
                chunk = await self._next_chunk()
            except BaseException as error:
                closed_meanwhile = self._closed
                self.close()
                if isinstance(error, Cancelled) and closed_meanwhile:
                    break
                if isinstance(error, StopAsyncIteration):
                    check_ended(self._chunks)
                raise
            self._chunks.append(chunk)
            if chunk:
                return chunk
        raise StopAsyncIteration

    async def _next_chunk(self) -> Chunk:
        try:
            response = await anext(self._responses)
            chunk = None if response.error_message else Chunk.of(wire.outputs(response.infer_response))
            if chunk is None or chunk.end is not None:
                async for _ in self._responses:  # see `client.remote`
                    pass
        except grpc.RpcError as error:
            raise errors.from_rpc(error, self._url) from None
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
            # This is how gRPC tells that the call was cancelled; to asyncio it would mean this task.
            raise Cancelled("the client was closed before the answer's end") from None
        if chunk is None:
            raise errors.from_text(response.error_message)
        return chunk

    def close(self) -> None:
        """Cancels the rest of the answer. Does nothing after its end."""
        self._closed = True
        self._call.cancel()

    async def completion(self) -> Completion:
        """The whole answer; reads what has not been read yet."""
        async for _ in self:
            pass
        return joined(self._chunks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._call.cancel()


class AsyncClient:
    """As `client.Client`, argument for argument and error for error."""

    def __init__(self, url: str = wire.DEFAULT_URL, *, model: str = wire.DIRECT, headers: Mapping[str, str] | None = None):
        self.url = url
        self._model = model
        self._metadata = tuple((headers or {}).items())
        self._channel = grpc.aio.insecure_channel(url, options=wire.channel_options(url))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def generate(
        self, prompt: Prompt, *, adapter: str | None = None, timeout_s: float | None = None, **sampling: Unpack[Sampling]
    ) -> Completion:
        """The whole answer to a prompt."""
        return await self._stream(prompt, adapter, timeout_s, False, sampling).completion()

    def stream(
        self, prompt: Prompt, *, adapter: str | None = None, timeout_s: float | None = None, **sampling: Unpack[Sampling]
    ) -> AsyncStream:
        """The same answer as it is made: `async for chunk in client.stream(...)`."""
        return self._stream(prompt, adapter, timeout_s, True, sampling)

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        adapter: str | None = None,
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """The assistant's next message."""
        return await self.generate(messages, adapter=adapter, timeout_s=timeout_s, **sampling)

    async def adapters(self, *, user: str | None = None, name: str | None = None) -> list[catalogue.Adapter]:
        """The catalogue: all adapters, those of a user, or the one of that name."""
        request = wire.catalogue_request(catalogue.query(user, name))
        return catalogue.parse(wire.catalogue_result(await self._call(self._stub.ModelInfer, request, errors.from_rpc)))

    async def is_ready(self) -> bool:
        """Whether the server and its models are ready."""
        return (await self._call(self._stub.ServerReady, wire.pb.ServerReadyRequest(), errors.from_rpc)).ready

    async def load_adapters(self) -> None:
        """Makes live what is new in the adapter store. Raises AdapterInvalid if something new was refused."""
        await self._call(self._stub.RepositoryModelLoad, wire.load_request(), errors.from_load)

    async def close(self) -> None:
        """Ends requests that are under way and the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any, error_of: Callable[[grpc.RpcError, str], ServingError]) -> Any:
        try:
            return await method(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, self.url) from None

    def _stream(
        self, prompt: Prompt, adapter: str | None, timeout_s: float | None, stream: bool, sampling: Mapping[str, Any]
    ) -> AsyncStream:
        request = wire.infer_request(self._model, fields_of(prompt, adapter, stream, sampling), timeout_s)
        call = self._stub.ModelStreamInfer(iter((request,)), metadata=self._metadata, timeout=wire.deadline(timeout_s))
        return AsyncStream(call, self.url)
