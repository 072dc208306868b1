"""`python -m server`: the server of this project in the foreground, until Ctrl-C; started again whenever its engine has stopped.

Knows what to show a person: what is wrong with the settings, how far the start is, what to type when it is ready.
"""

import argparse
import itertools
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
from server.launch import EngineStopped, ServerDied, TritonServer
from server.restarts import Backoff


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m server", description="Serves in the foreground until Ctrl-C.", epilog="Settings are environment variables: python -m jaxlora.settings prints them."
    ).parse_args()
    # SIGINT too: a shell starts background jobs with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        settings = preflight.with_address(Settings.read(parameters=repository.parameters(repository.REPOSITORY)))
        backoff = Backoff()
        for restarts in itertools.count():
            pause = backoff.pause_s(_serve(settings, restarts))
            _say(f"starting again in {pause:g} s")
            time.sleep(pause)
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


def _serve(settings: Settings, restarts: int) -> float:
    """Serves until the engine stops; gives the seconds that it served."""
    started = time.monotonic()
    folder = preflight.check(settings, progress=_say)
    with TritonServer(settings, on_line=_forward, restarts=restarts, base_folder=folder) as server:
        ready = time.monotonic()
        _say(f"ready after {ready - started:.0f} s\n")
        print(_welcome(server), flush=True)
        try:
            server.wait()
        except EngineStopped as error:
            _say(f"{error}; the log is {server.log_path}")
        return time.monotonic() - ready


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
