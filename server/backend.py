"""What the Python models of the repository share: reading a request, answering with an error, failing a load without telling paths.

Runs inside Triton's Python backend, and is the only module beside the models that knows its API
(https://github.com/triton-inference-server/python_backend). Knows no model.
"""

import functools
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from jaxlora.checkpoint import resolve
from jaxlora.errors import ServingError, SetupError
from jaxlora.service.fields import FIELDS, INPUT_IDS
from jaxlora.settings import Settings

PROGRESS = "progress: "
"""What a printed line begins with when a person who waits for the server should see it."""

BASE_FOLDER = "JAXLORA_BASE_FOLDER"
"""The environment variable in which the launcher names the base model's folder."""

# Triton gives the process of a model an ASCII stdout: what is logged of a request or an adapter may hold any letter.
for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(encoding="utf-8", errors="backslashreplace")

_LISTS = {field.name for field in (*FIELDS.values(), INPUT_IDS) if field.dims == -1}


def progress(text: str) -> None:
    """Shows a line of text to the person who started the server."""
    print(f"{PROGRESS}{text}\n", end="", flush=True)  # in one piece, as several threads may call it


def settings(args: Mapping[str, str]) -> Settings:
    """The settings of a model: `args` is what Triton gives to `initialize`. Raises SetupError for wrong values."""
    parameters = json.loads(args["model_config"]).get("parameters", {})
    return Settings.read(parameters={name: value["string_value"] for name, value in parameters.items()})


def base_folder(settings: Settings) -> pathlib.Path:
    """The base model's folder: the one that the launcher found, so that whatever is loaded later has the same and finds it at once, or else found here.

    Raises:
        SetupError: see `jaxlora.checkpoint.resolve`.
    """
    found = os.environ.get(BASE_FOLDER)
    if found and pathlib.Path(found, "config.json").is_file():
        return pathlib.Path(found)
    return resolve(settings.model, settings.cache_dir, progress)


def rows(request: Any) -> list[dict[str, Any]]:
    """The tensors of a request, one dict a row, by name: bytes for TYPE_STRING, else Python numbers; lists for the fields of many values.

    Triton has checked names, types and shapes `[n, k]` against the model's config, and that all tensors have the same n.
    """
    arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    count = min(len(array) for array in arrays.values())
    return [
        {name: values if name in _LISTS else values[0] for name, array in arrays.items() for values in [array[row].tolist()]}
        for row in range(count)
    ]


def parameters(request: Any) -> dict[str, Any]:
    """The request's parameters by name: strings, numbers and booleans."""
    return json.loads(request.parameters() or "{}")


def error_response(error: BaseException) -> Any:
    """The answer to a request that `error` ended. The text of an error that is not a ServingError goes to the log only.

    The text begins with the error's name, since neither HTTP nor a gRPC stream passes the code on.
    """
    import triton_python_backend_utils as pb_utils

    if isinstance(error, ServingError):
        code, text = error.code, f"{error.name}: {error}"
    else:
        traceback.print_exception(error)
        code, text = "INTERNAL", f"INTERNAL: internal error ({type(error).__name__}); the server's log has the details"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, getattr(pb_utils.TritonError, code)))


def send_error(response_sender: Any, error: BaseException) -> None:
    """The same for a decoupled model: the error is the last response of the request."""
    import triton_python_backend_utils as pb_utils

    response_sender.send(error_response(error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def unload(model: str) -> None:
    """Takes a model out of service, so that it shows as not ready. Returns at once: Triton finalizes it when its requests have ended."""
    import triton_python_backend_utils as pb_utils

    try:
        pb_utils.unload_model(model)
    except Exception as error:  # in another model control mode than EXPLICIT
        print(f"{model} can't be taken out of service: {error}", flush=True)


def refusing(initialize: Callable[[Any, dict[str, str]], None]) -> Callable[[Any, dict[str, str]], None]:
    """Decorates `initialize`: a SetupError or ServingError becomes the text of the 400 that answers the load.

    Triton appends the traceback of the exception to that text. It starts here, in a function whose file has no folder, so the text tells
    nothing about the server's disk.
    """

    def refuse(self: Any, args: dict[str, str]) -> None:
        import triton_python_backend_utils as pb_utils

        try:
            initialize(self, args)
            return
        except (SetupError, ServingError) as error:
            text = str(error)
        except Exception as error:
            traceback.print_exception(error)
            text = f"internal error ({type(error).__name__}); the server's log has the details"
        raise pb_utils.TritonModelException(text)

    refuse.__code__ = refuse.__code__.replace(co_filename="model.py", co_name="initialize")
    return functools.wraps(initialize)(refuse)
