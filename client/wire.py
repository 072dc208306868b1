"""Between fields and Triton's gRPC messages, and which calls there are. The synchronous and the asynchronous client share this.

Protocol: KServe v2 with Triton's extensions,
https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto"""

import os
import struct
from collections.abc import Mapping
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from client.proxies import is_local
from jaxlora.errors import InvalidRequest
from jaxlora.service.fields import FIELDS

DEFAULT_URL = f"localhost:{os.environ.get('GRPC_PORT') or 8001}"  # where `make serve` listens with the same environment
DIRECT, ENSEMBLE, ADAPTERS = "jax_lora", "llm", "adapters"

# The server ends a request that passes its time-out; this is for a server that no longer answers at all.
GRACE_S = 5.0
MAX_TIMEOUT_S = 1e9

_CONTENTS = {
    "TYPE_STRING": ("BYTES", "bytes_contents"),
    "TYPE_BOOL": ("BOOL", "bool_contents"),
    "TYPE_INT32": ("INT32", "int_contents"),
    "TYPE_UINT64": ("UINT64", "uint64_contents"),
    "TYPE_FP32": ("FP32", "fp32_contents"),
}
_NUMBERS = {"UINT32": "<I", "INT32": "<i", "FP32": "<f", "BOOL": "<?"}


def channel_options(url: str) -> list[tuple[str, int]]:
    """Options of a gRPC channel to a server: messages of any size, and no proxy to one of this machine."""
    sizes = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    return [*sizes, ("grpc.enable_http_proxy", 0)] if is_local(url) else sizes


def infer_request(model: str, fields: Mapping[str, Any], timeout_s: float | None) -> pb.ModelInferRequest:
    """A request of one row with one value a field. Raises InvalidRequest for a time-out that can't be sent."""
    request = pb.ModelInferRequest(model_name=model)
    for name, value in fields.items():
        datatype, contents = _CONTENTS[FIELDS[name].type]
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        getattr(tensor.contents, contents).append(value)
    if timeout_s is not None:
        if not timeout_s < MAX_TIMEOUT_S:
            raise InvalidRequest({"timeout_s": f"{timeout_s} is not under {MAX_TIMEOUT_S:g} seconds"})
        request.parameters["timeout"].int64_param = max(1, round(timeout_s * 1e6))
    return request


def deadline(timeout_s: float | None) -> float | None:
    """The time-out of the call that carries a request, in seconds."""
    return None if timeout_s is None else timeout_s + GRACE_S


def outputs(response: pb.ModelInferResponse) -> dict[str, Any]:
    """The output values of a response of one row by name: text as str, numbers as Python numbers."""
    return {output.name: _value(output.datatype, raw) for output, raw in zip(response.outputs, response.raw_output_contents)}


def catalogue_request(query: bytes) -> pb.ModelInferRequest:
    """A question to the `adapters` model."""
    request = pb.ModelInferRequest(model_name=ADAPTERS)
    request.inputs.add(name="query", datatype="BYTES", shape=[1]).contents.bytes_contents.append(query)
    return request


def catalogue_result(response: pb.ModelInferResponse) -> bytes:
    """Its answer."""
    return response.raw_output_contents[0][4:]


def load_request() -> pb.RepositoryModelLoadRequest:
    """Asks Triton to load the `adapters` model."""
    return pb.RepositoryModelLoadRequest(model_name=ADAPTERS)


def _value(datatype: str, raw: bytes) -> Any:
    if datatype == "BYTES":  # four bytes of length come first
        return raw[4:].decode("utf-8", "replace")
    return struct.unpack(_NUMBERS[datatype], raw)[0]
