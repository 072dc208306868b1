"""What the command lines share: their common arguments, how a client is made from them, and how an error ends them."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from client import wire
from client.interface import LanguageModel
from client.remote import Client
from jaxlora.errors import ServingError, SetupError
from server import access

FAILED, INTERRUPTED = 1, 130


def add_server(parser: argparse.ArgumentParser, default: Any = wire.DEFAULT_URL) -> None:
    """`--url`."""
    parser.add_argument(
        "--url", default=default, metavar="HOST:PORT", help=f"the server's gRPC address (default: {wire.DEFAULT_URL})"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """What names who answers: the server or this process, and the adapter."""
    add_server(parser)
    parser.add_argument(
        "--local", action="store_true", help="answer in this process, without a server; it loads the model that MODEL names"
    )
    parser.add_argument("--adapter", metavar="USER/NAME[@VERSION]", help="adapter to answer with (default: the base model)")


_SAMPLING: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (int, "most tokens to generate"),
    "min_tokens": (int, "fewest tokens to generate"),
    "temperature": (float, "0 (the default) always takes the likeliest token"),
    "top_k": (int, "sample from this many of the likeliest tokens"),
    "top_p": (float, "sample from the likeliest tokens with this total probability"),
    "min_p": (float, "leave out tokens less likely than this share of the likeliest one"),
    "repetition_penalty": (float, "over 1: against tokens of prompt and answer"),
    "frequency_penalty": (float, "against tokens by how often the answer has them"),
    "presence_penalty": (float, "against tokens that the answer has"),
    "seed": (int, "the same seed gives the same answer"),
    "priority": (int, "of the requests for an adapter that wait, those with the lowest number go first (default 0)"),
}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Sampling settings under their names in `client.requests.Sampling`."""
    group = parser.add_argument_group("sampling; what is not given is the server's default")
    for name, (kind, help) in _SAMPLING.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=help)
    group.add_argument("--stop", dest="stop_words", action="append", metavar="TEXT", help="end before this text; may be repeated")


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that were given."""
    return {name: value for name in (*_SAMPLING, "stop_words") if (value := getattr(arguments, name)) is not None}


def connect(arguments: argparse.Namespace) -> LanguageModel:
    """The client that the arguments ask for. The one place for what else a call to a server carries."""
    if getattr(arguments, "local", False):
        from client.local import LocalClient

        return LocalClient(progress=lambda line: print(line, file=sys.stderr, flush=True))
    return Client(arguments.url, headers=access.grpc_headers())


def run(command: Callable[[], int | None]) -> int:
    """The exit code of a command; an error is one line, or one a problem, on stderr."""
    try:
        return command() or 0
    except (ServingError, SetupError) as error:
        show_error(error)
        return FAILED
    except BrokenPipeError:
        # Whoever read the output has had enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except UnicodeDecodeError as error:
        show_error(f"the input is not valid UTF-8 (byte {error.start})")
        return FAILED
    except OSError as error:
        show_error(f"{error.filename}: {error.strerror}" if error.filename else error)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def show_error(error: object) -> None:
    """`error: ...` on stderr, a line for each problem."""
    problems = getattr(error, "problems", [str(error)])
    if isinstance(problems, dict):
        problems = [f"{field}: {problem}" for field, problem in problems.items()]
    for line in "\n".join(problems).splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)
