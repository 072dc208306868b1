"""`python -m client.generate "The capital of France is"`: one answer on stdout, streamed as it is made. Ctrl-C cancels it."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from client import terminal
from client.answers import Completion
from client.requests import Prompt


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    arguments = _parser().parse_args(argv)
    return terminal.run(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m client.generate", description="Answers one prompt.")
    parser.add_argument("prompt", nargs="?", help="text to continue; default, and `-`: what comes on stdin")
    terminal.add_model(parser)
    parser.add_argument(
        "--chat", action="store_true", help="take the prompt as a user's message rather than as a text to continue"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message; implies --chat")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--json", action="store_true", help="print the answer, its token counts and timings as JSON, when it is complete"
    )
    output.add_argument("--stats", action="store_true", help="print token counts and timings to stderr in the end")
    parser.add_argument("--timeout", type=float, metavar="S", help="bound on the whole request, in seconds")
    terminal.add_sampling(parser)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    prompt = _prompt(arguments)
    settings = {"adapter": arguments.adapter, "timeout_s": arguments.timeout, **terminal.sampling(arguments)}
    with terminal.connect(arguments) as client:
        if arguments.json:
            print(json.dumps(dataclasses.asdict(client.generate(prompt, **settings)), ensure_ascii=False, indent=2))
            return
        with client.stream(prompt, **settings) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
            print()
            if arguments.stats:
                print(summary(stream.completion()), file=sys.stderr)


def summary(completion: Completion) -> str:
    """Token counts and speed on one line."""
    usage, metrics = completion.usage, completion.metrics
    return (
        f"{completion.adapter or 'base model'}: {usage.prompt_tokens} + {usage.completion_tokens} tokens, "
        f"ended by {completion.finish_reason}; "
        f"first token after {metrics['ttft_ms']:.0f} ms, then {metrics['tokens_per_second']:.1f} tokens/s"
    )


def _prompt(arguments: argparse.Namespace) -> Prompt:
    text = arguments.prompt
    if text is None or text == "-":
        text = sys.stdin.read()
    if not arguments.chat and arguments.system is None:
        return text
    system = [{"role": "system", "content": arguments.system}] if arguments.system is not None else []
    return [*system, {"role": "user", "content": text}]


if __name__ == "__main__":
    sys.exit(main())
