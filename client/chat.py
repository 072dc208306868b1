"""`python -m client.chat`: a conversation in the terminal. Answers stream; Ctrl-C cancels the answer, not the program.

Reads messages line by line, from a terminal or a pipe. Knows no server: any LanguageModel answers.
"""

import argparse
import signal
import sys
from collections.abc import Generator, Sequence
from typing import Any

from client import terminal
from client.interface import LanguageModel, Stream
from client.interrupts import Interrupts
from jaxlora.errors import ServingError

HELP = """\
/adapter USER/NAME[@VERSION]  answer with this adapter from now on; the conversation goes on
/adapter base                 answer with the base model
/adapter                      show what answers, and which adapters there are
/reset                        forget the conversation
/help                         show this
/quit                         leave; so does Ctrl-D
Ctrl-C cancels an answer."""


class Conversation:
    """A conversation so far, and how it goes on.

    Arguments:
        client: who answers.
        sampling: settings of every answer.
    """

    def __init__(self, client: LanguageModel, adapter: str | None, system: str | None, sampling: dict[str, Any]):
        self._client, self._sampling = client, sampling
        self._start = [{"role": "system", "content": system}] if system is not None else []
        self.adapter = adapter
        self.messages = list(self._start)
        self._answer: Stream | None = None

    def reset(self) -> None:
        self.messages = list(self._start)

    def switch(self, name: str) -> None:
        """Raises ServingError if there is no adapter of that name."""
        if name != "base":
            self._client.adapters(name=name)
        self.adapter = None if name == "base" else name

    def say(self, text: str) -> Generator[str, None, None]:
        """The answer to a message, piece by piece. Message and answer become part of the conversation, a part of an answer that
        was cancelled too; not where there is no answer at all."""
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        try:
            with self._client.stream(asked, adapter=self.adapter, **self._sampling) as self._answer:
                for chunk in self._answer:
                    answer += chunk.text
                    yield chunk.text
        finally:
            if answer:
                self.messages = [*asked, {"role": "assistant", "content": answer}]

    def cancel(self) -> None:
        """Ends the answer that is on its way, if there is one. Any thread may call it."""
        if self._answer is not None:
            self._answer.close()

    def describe_adapters(self) -> str:
        """What answers now, and the adapters that could."""
        names = [adapter.name for adapter in self._client.adapters() if adapter.serving is not None]
        return f"{self.adapter or 'the base model'} answers; adapters: {', '.join(names) or 'none'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    parser = argparse.ArgumentParser(
        "python -m client.chat", description="Chats with the model.", epilog="In the chat, /help tells more."
    )
    terminal.add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    terminal.add_sampling(parser)
    arguments = parser.parse_args(argv)
    return terminal.run(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    with terminal.connect(arguments) as client:
        conversation = Conversation(client, None, arguments.system, terminal.sampling(arguments))
        if arguments.adapter:
            conversation.switch(arguments.adapter)
        if not sys.stdin.isatty():
            return _read_pipe(conversation)
        print(f"{conversation.describe_adapters()}\n/help shows the commands.")
        _read_terminal(conversation)
        return 0


def _read_terminal(conversation: Conversation) -> None:
    import readline  # noqa: F401  gives `input` a line editor and a history

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this may have it ignored
    while True:
        try:
            line = input(f"{conversation.adapter or 'base'}> ")
            if line.strip() == "/quit":
                return
            _take(conversation, line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves")


def _read_pipe(conversation: Conversation) -> int:
    """The exit code is that of the worst line."""
    code = 0
    for line in sys.stdin:
        if line.strip() == "/quit":
            break
        code = max(code, _take(conversation, line.rstrip("\n")))
    return code


def _take(conversation: Conversation, line: str) -> int:
    """Does what one line says and prints what comes of it; gives its exit code."""
    command, _, argument = line.strip().partition(" ")
    try:
        if command == "/help":
            print(HELP)
        elif command == "/reset":
            conversation.reset()
        elif command == "/adapter" and argument.strip():
            conversation.switch(argument.strip())
        elif command == "/adapter":
            print(conversation.describe_adapters())
        elif command.startswith("/"):
            print(f"there is no command {command}; /help shows those there are", file=sys.stderr)
            return terminal.FAILED
        elif command:
            _print_answer(conversation, line)
    except ServingError as error:
        terminal.show_error(error)
        return terminal.FAILED
    return 0


def _print_answer(conversation: Conversation, text: str) -> None:
    answer = conversation.say(text)
    with Interrupts(conversation.cancel) as interrupts:
        try:
            for piece in answer:
                print(piece, end="", flush=True)
                if interrupts.seen:  # before there was anything to cancel
                    break
        finally:
            answer.close()
            print(" [cancelled]" if interrupts.seen else "", flush=True)


if __name__ == "__main__":
    sys.exit(main())
