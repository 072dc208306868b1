"""Chat messages: checked, then rendered to a prompt by the checkpoint's own template.

A template is a Jinja program that came with a checkpoint. It runs in the sandbox, and with the names and filters, that
Transformers gives it (`transformers.utils.chat_template_utils`), so that the same template gives the same prompt.
Transformers itself is not imported, for that takes a second.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from jaxlora.errors import InvalidRequest, SetupError

_FIELD = "messages"
# Templates put the role between control tokens, where a line break or a token's text would forge a turn.
_ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST_PROBLEMS = 20


def parse_messages(text: str | bytes) -> list[dict[str, Any]]:
    """Messages from their JSON text: a list of objects that each have the strings `role` and `content`.

    Keys beside those two are kept for the template.

    Raises:
        InvalidRequest: under `messages`, everything that is wrong.
    """
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise InvalidRequest({_FIELD: f"is not valid JSON: {reason}"}) from None
    check_messages(messages)
    return messages


def check_messages(messages: Any) -> None:
    """Raises InvalidRequest, under `messages`, with everything that is wrong with already parsed messages."""
    if not isinstance(messages, list):
        raise InvalidRequest({_FIELD: f"is {_kind(messages)}; expected a list of objects with `role` and `content`"})
    if not messages:
        raise InvalidRequest({_FIELD: "is empty; expected at least one message"})
    problems = [problem for index, message in enumerate(messages) for problem in _message_problems(index, message)]
    if len(problems) > _MOST_PROBLEMS:
        problems = [*problems[:_MOST_PROBLEMS], f"and {len(problems) - _MOST_PROBLEMS} more"]
    if problems:
        raise InvalidRequest({_FIELD: ", ".join(problems)})


def _message_problems(index: int, message: Any) -> list[str]:
    if not isinstance(message, dict):
        return [f"[{index}] is {_kind(message)}; expected an object with `role` and `content`"]
    problems = []
    for key in ("role", "content"):
        if key not in message:
            problems.append(f"[{index}] has no `{key}`")
        elif not isinstance(message[key], str):
            problems.append(f"[{index}].{key} is {_kind(message[key])}; expected a string")
        elif not is_unicode(message[key]):
            problems.append(f"[{index}].{key} holds half of a surrogate pair")
        elif key == "role" and not _ROLE.fullmatch(message[key]):
            problems.append(f"[{index}].role is not 1 to 64 letters, digits, `_` or `-`")
    return problems


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: JSON escapes can make strings that hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


class ChatTemplate:
    """A compiled chat template.

    Arguments:
        source: the Jinja text.
        special_tokens: `bos_token`, `eos_token`, ... by name, which templates may print.

    Raises:
        SetupError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise SetupError(f"MODEL: the chat template is not valid Jinja: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The prompt for checked `messages`.

        Raises:
            InvalidRequest: the template refuses the messages, for example roles that do not alternate.
        """
        variables = {**self._special_tokens, "tools": None, "documents": None}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        # A template is a program: on messages that it did not expect it can raise anything.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise InvalidRequest({_FIELD: f"the chat template of this model refuses them: {reason}"}) from error


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's answer for training; a prompt only needs what is inside."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
