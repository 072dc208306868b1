"""From what a server says went wrong to the errors of `jaxlora.errors`.

A stream carries an error as text only. The models of this project begin it with the error's name, `NOT_FOUND: ...`, and an ensemble puts
`in ensemble 'llm', ` before that. What has no name comes from Triton itself.
"""

import re

import grpc

from jaxlora.errors import (
    AdapterInvalid,
    AdapterNotFound,
    Cancelled,
    EngineError,
    InvalidRequest,
    RequestTimeout,
    ServingError,
    Unavailable,
)
from jaxlora.service.fields import FIELDS

_ENSEMBLE = re.compile(r"in ensemble '[^']*', ")
_NAMED = re.compile(r"([A-Z][A-Z_]+): (.*)", re.DOTALL)
_FIELD = re.compile(rf"(?:^|; )({'|'.join(sorted({*FIELDS, 'input_ids', 'query'}, key=len, reverse=True))}): ")
_RETRY = re.compile(r"(.*); try again in ([0-9.e+-]+) s", re.DOTALL)
_MISSING_MODEL = re.compile(r"Request for unknown model: |.* has no available versions|.* is not ready")
_RESTRICTED = re.compile(r"This protocol is restricted, expecting header ")
_LOAD_REASON = re.compile(r".*?\bTritonModelException: (.*?)(?:\n+At:\n.*)?", re.DOTALL)


class ServerUnreachable(Unavailable):
    """No server answers at the address, or the connection to it was lost."""


class AccessDenied(ServingError):
    """The server asks for a key that the call did not carry."""


def from_text(text: str) -> ServingError:
    """The error that a model's answer stands for. Its `str()` is what the server's own error said."""
    text = _ENSEMBLE.sub("", text, count=1) if _ENSEMBLE.match(text) else text
    match = _NAMED.fullmatch(text)
    if match is None:
        return Unavailable(f"the server is not ready to answer: {text}") if _MISSING_MODEL.match(text) else EngineError(text)
    name, message = match.groups()
    return _of_name(name, message) or EngineError(text)


def from_rpc(error: grpc.RpcError, url: str) -> ServingError:
    """The error that a failed call stands for: one of the server's, or that there is no server."""
    code, details = error.code(), error.details() or ""
    if _NAMED.fullmatch(details) and (known := from_text(details)) and str(known) != details:
        return known
    if code == grpc.StatusCode.CANCELLED:
        return Cancelled("cancelled by the client")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return RequestTimeout(f"no answer from {url} within the request's time-out")
    if _RESTRICTED.match(details):
        return AccessDenied(f"{url} wants its key for that: set ADMIN_KEY to the one that the server was started with")
    if code == grpc.StatusCode.UNAVAILABLE and not _MISSING_MODEL.match(details):
        reason = details.rpartition(": ")[2].rstrip("]")  # gRPC's own words, without what it went through to get there
        return ServerUnreachable(f"no server answers at {url}: {reason or 'no reason given'} (is it running? `make serve` starts one)")
    return from_text(details or str(code))


def from_load(error: grpc.RpcError, url: str) -> ServingError:
    """The error that a refused load of a model stands for, without Triton's traceback."""
    match = _LOAD_REASON.fullmatch(error.details() or "")
    return AdapterInvalid([match[1].strip()]) if match else from_rpc(error, url)


def _of_name(name: str, message: str) -> ServingError | None:
    if name == InvalidRequest.code:
        return InvalidRequest(_problems(message))
    if name in (Unavailable.code, RequestTimeout.name):
        known = RequestTimeout if name == RequestTimeout.name else Unavailable
        retry = _RETRY.fullmatch(message)
        return known(retry[1], float(retry[2])) if retry else known(message)
    for known in (AdapterNotFound, Cancelled, EngineError):
        if name == known.code:
            return known(message)
    return None


def _problems(message: str) -> dict[str, str]:
    """The problems by field, such that InvalidRequest says `message` again."""
    parts = _FIELD.split(message)
    if parts[0] or len(parts) == 1:
        field, _, problem = message.partition(": ")
        return {field: problem}
    return dict(zip(parts[1::2], parts[2::2], strict=True))
