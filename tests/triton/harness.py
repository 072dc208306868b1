"""A real Triton for tests: started over a repository and a store of its own, and spoken to over HTTP and gRPC as clients do."""

import contextlib
import dataclasses
import json
import pathlib
import queue
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tritonclient.grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxlora.service.fields import FIELDS
from jaxlora.settings import Settings
from server import preflight, repository
from server.launch import TritonServer

START_TIMEOUT_S = 240
CACHE = repository.PROJECT / "cache" / "tests"
"""Keeps what compiling takes long from one run to the next."""
ANSWER_TIMEOUT_S = 60

_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
_NUMPY = {"TYPE_STRING": np.object_, "TYPE_BOOL": np.bool_, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32, "TYPE_UINT64": np.uint64}


class Refused(Exception):
    """The server answered with an error. `status` is HTTP's, or None over gRPC."""

    def __init__(self, message: str, status: int | None = None):
        self.status = status
        super().__init__(message)


@contextlib.contextmanager
def serving(
    folder: pathlib.Path, models: tuple[str, ...] = repository.MODELS, start_timeout_s: float = START_TIMEOUT_S, **settings: Any
) -> Iterator[TritonServer]:
    """A server that is ready, with a copy of the repository and an empty store in `folder`, on free ports.

    Arguments:
        settings: what differs from the defaults. The cache is in `folder` too, unless named here.

    Its log is `folder`'s `triton.log`.
    """
    model_repository = folder / "model_repository"
    if not model_repository.exists():
        repository.copy(model_repository)
    ports = dict(zip(preflight.PORTS, preflight.free_ports(len(preflight.PORTS)), strict=True))
    own = dataclasses.replace(Settings(), **({"cache_dir": folder / "cache"} | ports | settings))
    server = TritonServer(own, model_repository=model_repository, models=models, log_path=folder / "triton.log")
    try:
        server.start()
        server.wait_until_ready(start_timeout_s)
        yield server
    finally:
        server.stop()


def check_still_runs(server: TritonServer) -> None:
    """For the end of a server that many tests share: if it ended by itself, their failures do not say why."""
    assert not server.has_ended(), "the shared server ended by itself:\n" + "\n".join(server.last_lines(100))


def write_byte_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """Adds a tokenizer to a checkpoint of 256 tokens: one token a byte, so a character can be several tokens. With a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": _TEMPLATE}))
    return folder


def processes(group: int | None = None, parent: int | None = None) -> dict[int, str]:
    """Command lines, by process id, of the living processes of a group or of a parent."""
    found = {}
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            state, its_parent, its_group = process.joinpath("stat").read_text().rpartition(") ")[2].split()[:3]
            if state != "Z" and group in (None, int(its_group)) and parent in (None, int(its_parent)):
                found[int(process.name)] = process.joinpath("cmdline").read_text().replace("\0", " ")
        except OSError:
            pass  # ended meanwhile
    return found


class Http:
    """The server's HTTP endpoints, with the names and shapes that `curl` users send. `headers` go with every call."""

    def __init__(self, server: TritonServer, headers: Mapping[str, str] | None = None):
        self.url = server.http_url
        self._headers = dict(headers or {})

    def generate(self, model: str = "llm", **fields: Any) -> dict[str, Any]:
        """`POST /v2/models/M/generate`: the one response."""
        with self._post(f"/v2/models/{model}/generate", fields) as answer:
            return json.load(answer)

    def stream(self, model: str = "llm", **fields: Any) -> Iterator[dict[str, Any]]:
        """`POST /v2/models/M/generate_stream`: the responses as they come. Closing the iterator closes the connection."""
        with self._post(f"/v2/models/{model}/generate_stream", fields) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    response = json.loads(line.removeprefix(b"data: "))
                    if "error" in response:
                        raise Refused(response["error"], answer.status)
                    yield response

    def load(self, model: str) -> None:
        """`POST /v2/repository/models/M/load`. Raises Refused with the reason if it fails."""
        self._post(f"/v2/repository/models/{model}/load", {}).close()

    def is_ready(self) -> bool:
        with urllib.request.urlopen(f"{self.url}/v2/health/ready", timeout=ANSWER_TIMEOUT_S) as answer:
            return answer.status == 200

    def _post(self, path: str, body: Mapping[str, Any] | bytes) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url + path, data, self._headers), timeout=ANSWER_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace").removeprefix("data: ")
            try:
                message = json.loads(text)["error"]
            except (ValueError, KeyError):
                message = text
            raise Refused(message, error.code) from None

    def post_raw(self, path: str, data: bytes) -> dict[str, Any]:
        """Posts bytes as they are."""
        with self._post(path, data) as answer:
            return json.load(answer)


class Grpc:
    """The server's gRPC endpoint, for one request at a time on a stream of its own."""

    def __init__(self, server: TritonServer):
        self.url = server.grpc_url

    def stream(
        self,
        model: str = "llm",
        *,
        rows: int = 1,
        tensors: Mapping[str, tuple[np.ndarray, str]] | None = None,
        parameters: Mapping[str, Any] | None = None,
        timeout_us: int | None = None,
        **fields: Any,
    ) -> Iterator[dict[str, list]]:
        """The responses to one request, each as lists of output rows by name.

        Arguments:
            rows: how often a value in `fields` is repeated; lists under the name of a single-valued field are one value a row.
            tensors: `(array, Triton type)` by name, sent as they are, beside the `fields`.
            parameters: the request's parameters.
            timeout_us: the request's time-out, in microseconds.
        """
        inputs = [_input(name, *_tensor(name, value, rows)) for name, value in fields.items()]
        inputs += [_input(name, *tensor) for name, tensor in (tensors or {}).items()]
        answers: queue.SimpleQueue = queue.SimpleQueue()
        with tritonclient.grpc.InferenceServerClient(self.url) as client:
            client.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=ANSWER_TIMEOUT_S)
            client.async_stream_infer(model, inputs, enable_empty_final_response=True, parameters=parameters, timeout=timeout_us)
            try:
                while True:
                    result, error = answers.get(timeout=ANSWER_TIMEOUT_S)
                    if error is not None:
                        raise Refused(error.message())
                    response = result.get_response()
                    if response.outputs:
                        yield {output.name: result.as_numpy(output.name).reshape(-1).tolist() for output in response.outputs}
                    if response.parameters["triton_final_response"].bool_param:
                        return
            finally:
                client.stop_stream(cancel_requests=True)

    def generate(self, model: str = "llm", **arguments: Any) -> dict[str, list]:
        """The one response to a request that is not streamed."""
        (response,) = self.stream(model, **arguments)
        return response


def text_of(responses: Iterator[dict[str, Any]]) -> str:
    """The whole text of a stream over HTTP."""
    return "".join(response["text_output"] for response in responses)


def _tensor(name: str, value: Any, rows: int) -> tuple[np.ndarray, str]:
    field = FIELDS[name]
    values = value if isinstance(value, list) and field.dims == 1 else [value] * rows
    array = np.array([each if field.dims == -1 else [each] for each in values], _NUMPY[field.type])
    return array, {"TYPE_STRING": "BYTES"}.get(field.type, field.type.removeprefix("TYPE_"))


def _input(name: str, array: np.ndarray, kind: str) -> tritonclient.grpc.InferInput:
    tensor = tritonclient.grpc.InferInput(name, array.shape, kind)
    tensor.set_data_from_numpy(array)
    return tensor
