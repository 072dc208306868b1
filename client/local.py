"""The same interface in this process, without a server: the service that the server's model runs, over a store folder.

Loads the base model and compiles for it, as a server does when it starts.
"""

import contextlib
import dataclasses
import os
import pathlib
import queue
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from client.answers import Chunk, End, logprobs_of
from client.interface import LanguageModel, Responses
from jaxlora.adapters import CatalogueReader, Report, refresh
from jaxlora.adapters.query import answer
from jaxlora.errors import AdapterInvalid, ServingError
from jaxlora.peft import Limits
from jaxlora.service.answers import Ending, Piece
from jaxlora.service.fields import merge_fields
from jaxlora.service.request_log import NONE, STDOUT
from jaxlora.service.service import LoraService
from jaxlora.settings import Settings
from server import repository


class LocalClient(LanguageModel):
    """A base model with its adapters in this process.

    The store's adapters are checked when it is made. It keeps a catalogue of its own, so it changes nothing for a server over the
    same store.

    Arguments:
        settings: see `jaxlora.settings`; default: what a server that is started here would have.
        store: folder that holds `users/`; default: the one of the model repository. It may be empty or missing.
        progress: told what is going on while the model loads, line by line.

    Raises:
        SetupError: the base model can't be served with these settings.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        store: str | os.PathLike[str] | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ):
        self._settings = settings or Settings.read(parameters=repository.parameters(repository.REPOSITORY))
        if self._settings.request_log == STDOUT:  # which belongs to the program here
            self._settings = dataclasses.replace(self._settings, request_log=NONE)
        self._store = pathlib.Path(store or repository.REPOSITORY / repository.STORE)
        self._folder = tempfile.TemporaryDirectory(prefix="jaxlora-")
        self._path = pathlib.Path(self._folder.name, "catalogue.json")
        self._catalogue = CatalogueReader(self._path)
        with contextlib.ExitStack() as undo:
            undo.callback(self._folder.cleanup)
            self._service = LoraService(self._settings, self._store, progress, self._catalogue)
            undo.callback(self._service.close)
            self._refresh()
            undo.pop_all()

    def load_adapters(self) -> None:
        report = self._refresh()
        if report.rejected:
            raise AdapterInvalid(report.problems())

    def close(self) -> None:
        self._service.close()
        self._folder.cleanup()

    def _start(self, fields: Mapping[str, Any], timeout_s: float | None) -> Responses:
        responses = _Responses()
        try:
            checked = merge_fields(fields, {}, self._settings)
            responses.cancel = self._service.submit(checked, responses, timeout_s=timeout_s).cancel
        except ServingError as error:
            responses.failed(error)  # told to whoever reads the stream, as a server's refusal is
        return responses

    def _refresh(self) -> Report:
        return refresh(self._store, self._path, self._service.config, Limits.of(self._settings))

    def _query(self, query: bytes) -> bytes:
        return answer(self._catalogue.current(), query)


class _Responses:
    """Hands an answer from the engine's thread to the one that reads it."""

    def __init__(self) -> None:
        self.cancel: Callable[[], None] = lambda: None
        self._arrived: queue.SimpleQueue[Chunk | ServingError] = queue.SimpleQueue()
        self._ended = False

    def piece(self, piece: Piece) -> None:
        self._arrived.put(Chunk(piece.text, logprobs_of(piece.logprobs)))

    def end(self, ending: Ending) -> None:
        end = End.of(ending.finish_reason, ending.adapter_name, ending.adapter_version, ending.metrics)
        self._arrived.put(Chunk(ending.text, end=end))

    def failed(self, error: ServingError) -> None:
        self._arrived.put(error)

    def __next__(self) -> Chunk:
        if self._ended:
            raise StopIteration
        arrived = self._arrived.get()
        self._ended = isinstance(arrived, ServingError) or arrived.end is not None
        if isinstance(arrived, ServingError):
            raise arrived
        return arrived

    def close(self) -> None:
        self.cancel()
