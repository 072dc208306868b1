"""What every synchronous client offers, whether the answers come over the network or from this process."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, Unpack

from client import catalogue
from client.answers import Chunk, Completion, check_ended, joined
from client.requests import Message, Prompt, Sampling, fields_of
from jaxlora.errors import Cancelled


class Responses(Protocol):
    """The chunks of one answer, from wherever it is made."""

    def __next__(self) -> Chunk:
        """Blocks for the next one. Raises StopIteration after the last one, or a ServingError."""

    def close(self) -> None:
        """Cancels what has not come yet; any thread may call it, also after the end."""


class Stream(Iterator[Chunk]):
    """An answer on its way: an iterator of chunks. The request has been sent when it is made.

    Leaving the loop, `close`, the end of a `with` block and dropping the object all cancel what has not come yet. One thread
    reads it; `close` may be called from another one, which ends the loop.
    """

    def __init__(self, responses: Responses):
        self._responses = responses
        self._chunks: list[Chunk] = []
        self._closed = False

    def __next__(self) -> Chunk:
        while not self._closed:
            try:
                chunk = next(self._responses)
            except BaseException as error:
                closed_meanwhile = self._closed
                self.close()
                if isinstance(error, Cancelled) and closed_meanwhile:
                    break
                if isinstance(error, StopIteration):
                    check_ended(self._chunks)
                raise
            self._chunks.append(chunk)
            if chunk:
                return chunk
        raise StopIteration

    def close(self) -> None:
        """Cancels the rest of the answer. Does nothing after its end."""
        self._closed = True
        self._responses.close()

    def completion(self) -> Completion:
        """The whole answer; reads what has not been read yet.

        Raises:
            Cancelled: the stream was closed before its end.
        """
        for _ in self:
            pass
        return joined(self._chunks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._responses.close()


class LanguageModel(abc.ABC):
    """A base model with its adapters. Any thread may call any method, and many requests may be under way at once.

    All methods raise the errors of `jaxlora.errors`: InvalidRequest names each bad field and its bound, AdapterNotFound what
    exists instead, Unavailable that a queue is full, RequestTimeout, EngineError; a client of a server raises ServerUnreachable
    as well.
    """

    def generate(
        self, prompt: Prompt, *, adapter: str | None = None, timeout_s: float | None = None, **sampling: Unpack[Sampling]
    ) -> Completion:
        """The whole answer to a prompt.

        Arguments:
            prompt: a text to continue, or chat messages.
            adapter: `user/adapter`, or `user/adapter@version` to pin one; None is the base model.
            timeout_s: bound on the whole request, queue included, in seconds.
        """
        return self._stream(prompt, adapter, timeout_s, False, sampling).completion()

    def stream(
        self, prompt: Prompt, *, adapter: str | None = None, timeout_s: float | None = None, **sampling: Unpack[Sampling]
    ) -> Stream:
        """The same answer as it is made. Arguments as for `generate`."""
        return self._stream(prompt, adapter, timeout_s, True, sampling)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        adapter: str | None = None,
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """The assistant's next message; `stream` takes messages too."""
        return self.generate(messages, adapter=adapter, timeout_s=timeout_s, **sampling)

    def adapters(self, *, user: str | None = None, name: str | None = None) -> list[catalogue.Adapter]:
        """The catalogue: all adapters, those of a user, or the one of that name (with one version only, if the name pins it).

        Raises:
            AdapterNotFound: there is no adapter or version of that name.
        """
        return catalogue.parse(self._query(catalogue.query(user, name)))

    @abc.abstractmethod
    def load_adapters(self) -> None:
        """Makes live what is new in the adapter store.

        Raises:
            AdapterInvalid: something new was refused, with the reasons. What was live stays live, and what else is new is live.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Ends requests that are under way and gives everything back. Further calls are errors."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stream(
        self, prompt: Prompt, adapter: str | None, timeout_s: float | None, stream: bool, sampling: Mapping[str, Any]
    ) -> Stream:
        return Stream(self._start(fields_of(prompt, adapter, stream, sampling), timeout_s))

    @abc.abstractmethod
    def _start(self, fields: Mapping[str, Any], timeout_s: float | None) -> Responses:
        """Sends a request and returns at once."""

    @abc.abstractmethod
    def _query(self, query: bytes) -> bytes:
        """The answer of the `adapters` model."""
