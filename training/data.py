"""Records to token ids with a mask of what is learned, in the forms that TRL's users have.

    {"messages": [{"role", "content"}, ...]}   every assistant turn is learned
    {"prompt": ..., "completion": ...}         the completion is learned; two texts, or two lists of messages
    {"text": ...}                              all of it is learned

Texts are taken as they are, messages go through the chat template of the base model. What is learned is found by comparing the
tokens of the whole with those of its beginning, and a line where the one is no prefix of the other is refused. A text or
completion ends with the EOS token, which is learned like any other; a chat turn ends as the template ends it. Knows no models and
no batches.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlora.errors import InvalidRequest
from jaxlora.text import Tokenizer
from training.method import Example, Question
from training.records import BadLine, Record, TooLong, text_of

FORMS = '{"messages"}, {"prompt", "completion"} or {"text"}'
Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes the records of one base model.

    Arguments:
        eos: the token that ends a text.
        max_length: longer examples are refused with TooLong.
    """

    tokenizer: Tokenizer
    eos: int
    max_length: int

    def example(self, record: Record) -> Example:
        """`tokens` int32 `[T]` and `mask` uint8 `[T]`. Raises BadLine or TooLong."""
        match _form(record.fields):
            case "text":
                ids = [*self._encode(text_of(record.fields, "text")), self.eos]
                learned = [(1, len(ids))]
            case "messages":
                ids, learned = self._turns(record.fields["messages"])
            case _:
                ids, start = self.completion(record.fields, "completion")
                learned = [(start, len(ids))]
        if len(ids) > self.max_length:
            raise TooLong(f"has {len(ids)} tokens, the limit is {self.max_length} (--max-length)")
        mask = np.zeros(len(ids), np.uint8)
        for start, end in learned:
            mask[max(start, 1) : end] = 1
        if not mask.any():
            raise BadLine("nothing in it is learned")
        return Example((record.number,), {"tokens": np.array(ids, np.int32), "mask": mask})

    def question(self, record: Record) -> Question | None:
        """The prompt and the last answer of a record; None for a text. Raises BadLine."""
        match _form(record.fields):
            case "text":
                return None
            case "messages":
                messages = record.fields["messages"]
                last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=0)
                prompt, answer = self._chat(messages[:last], True), messages[last]["content"]
            case _:
                prompt, answer = self.prompt(record.fields["prompt"]), record.fields["completion"]
                answer = answer if isinstance(answer, str) else answer[-1]["content"]
        return Question(record.number, tuple(prompt), answer)

    def prompt(self, prompt: Any) -> list[int]:
        """Token ids of a prompt: a text as it is, or messages by the template with its generation prompt. Raises BadLine."""
        if isinstance(prompt, list):
            return self._chat(prompt, True)
        return self._encode(text_of({"prompt": prompt}, "prompt"))

    def completion(self, fields: Mapping[str, Any], key: str) -> tuple[list[int], int]:
        """Token ids of `prompt` and `fields[key]` together, and where the second one begins. Both are texts, or both lists of
        messages.

        Raises:
            BadLine: something else, or the prompt's tokens are no prefix of the whole.
        """
        prompt, answer = fields.get("prompt"), fields.get(key)
        if isinstance(prompt, list) and isinstance(answer, list):
            prefix = self._chat(prompt, True)
            whole = self._chat([*prompt, *answer], False)
            self._check_header(prompt, answer, prefix)
        else:
            text, answer = text_of(fields, "prompt"), text_of(fields, key)
            prefix, whole = self._encode(text), [*self._encode(text + answer), self.eos]
        _check_prefix(
            prefix,
            whole,
            f"`prompt` and `{key}` join inside a token; end the prompt with a space or a line break, or begin the other with one",
        )
        return whole, len(prefix)

    def _turns(self, messages: Any) -> tuple[list[int], list[tuple[int, int]]]:
        whole = self._chat(messages, False)
        learned = []
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if at == 0:
                raise BadLine("the first message is the assistant's; there is nothing that it answers")
            before, after = self._chat(messages[:at], True), self._chat(messages[: at + 1], False)
            self._check_header(messages[:at], [message], before)
            for part in (before, after):
                _check_prefix(
                    part,
                    whole,
                    f"the chat template changes what is before message {at} when more follows; give each answer its own line",
                )
            learned.append((len(before), len(after)))
        if not learned:
            raise BadLine("no message has the role `assistant`")
        return whole, learned

    def _check_header(self, before: Messages, answer: Sequence[Mapping[str, Any]], with_prompt: list[int]) -> None:
        """A template that opens the assistant's turn with a header has to do so in its generation prompt, or the header would be
        learned as a part of the answer, which no server's prompt ends with."""
        if with_prompt != self._chat(before, False):
            return
        rendered = self.tokenizer.render_chat([*before, *answer], False)
        rest = rendered[len(self.tokenizer.render_chat(before, False)) :].lstrip()
        content = answer[0]["content"].lstrip()
        if not rest.startswith(content):
            header = rest.split(content)[0] if content and content in rest else rest[:40]
            raise BadLine(f"the chat template has no generation prompt: the answer would begin with {header!r}")

    def _chat(self, messages: Messages, generation_prompt: bool) -> list[int]:
        try:
            return self.tokenizer.apply_chat_template(messages, generation_prompt)
        except InvalidRequest as error:
            raise BadLine(str(error)) from None

    def _encode(self, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text, field="text")
        except InvalidRequest as error:
            raise BadLine(str(error)) from None


def _form(fields: Mapping[str, Any]) -> str:
    if "messages" in fields:
        return "messages"
    if "prompt" in fields and "completion" in fields:
        return "completion"
    if "text" in fields:
        return "text"
    raise BadLine(f"has {', '.join(f'`{key}`' for key in fields) or 'no fields'}; expected {FORMS}")


def _check_prefix(prefix: list[int], whole: list[int], problem: str) -> None:
    if whole[: len(prefix)] != prefix:
        raise BadLine(problem)
