"""`python -m server`: the server of this project in the foreground, until Ctrl-C.

Knows what to show a person: what is wrong with the settings, how far the start is, what to type when it is ready.
"""

import json
import os
import pathlib
import signal
import sys
import time

from jaxlora.errors import SetupError
from jaxlora.settings import Settings
from server import preflight, repository
from server.backend import PROGRESS
from server.launch import ServerDied, TritonServer


def main() -> int:
    # SIGINT too: a shell starts background jobs with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    started = time.monotonic()
    try:
        settings = Settings.read(parameters=repository.parameters(repository.REPOSITORY))
        preflight.check(settings, progress=_say)
        with TritonServer(settings, on_line=_forward) as server:
            _say(f"ready after {time.monotonic() - started:.0f} s\n")
            print(_welcome(server), flush=True)
            server.wait()
    except SetupError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 1
    except ServerDied as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say("stopped")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _forward(line: str) -> None:
    if line.startswith(PROGRESS):
        _say(line.removeprefix(PROGRESS))
    elif "successfully loaded '" in line:
        _say(f"loaded {line.split(chr(39))[1]}")


def _welcome(server: TritonServer) -> str:
    body = json.dumps({"text_input": "The capital of France is", "max_tokens": 24, "stream": True})
    python = pathlib.Path(sys.prefix, "bin", "python")
    if python.is_relative_to(os.getcwd()):
        python = python.relative_to(os.getcwd())
    return f"""\
HTTP     {server.http_url}
gRPC     {server.grpc_url}
metrics  {server.metrics_url}
adapters {server.store / 'users'}
log      {server.log_path}

Try, in another terminal:
  curl -N {server.http_url}/v2/models/llm/generate_stream -d '{body}'
  {python} -m client.generate --url {server.grpc_url} "The capital of France is"
  {python} -m client.adapters --url {server.grpc_url} list

Ctrl-C stops the server."""


if __name__ == "__main__":
    sys.exit(main())
