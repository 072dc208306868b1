"""From a call to the fields of a request. Every client sends the same fields, so that every client gets the same answer.

Knows the names of the fields; what is right in them is for whoever answers to say.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from jaxlora.errors import InvalidRequest

Message = Mapping[str, str]
"""One chat message: `{"role": "user", "content": "..."}`."""

Prompt = str | Sequence[Message]
"""A string is continued as it is; a list of messages goes through the model's chat template."""


class Sampling(TypedDict, total=False):
    """How an answer's tokens are chosen, when it ends, and when its turn comes; bounds and defaults are those of `jaxlora.service.fields`."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int
    stop_words: Sequence[str]
    bad_words: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    exclude_input_in_output: bool
    priority: int


def fields_of(prompt: Prompt, adapter: str | None, stream: bool, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request by name, as `jaxlora.service.fields.merge_fields` takes them.

    Sampling settings travel as one JSON object rather than as tensors: numbers keep their full precision, and what is out of
    bounds reaches the server's own check.

    Raises:
        InvalidRequest: a text can't be written as UTF-8: it holds half of a surrogate pair.
    """
    fields: dict[str, Any] = {"stream": stream}
    if isinstance(prompt, str):
        fields["text_input"] = prompt
    else:
        fields["messages"] = json.dumps(list(prompt), default=dict, ensure_ascii=False)
    if adapter:
        fields["lora_name"] = adapter
    if sampling:
        fields["sampling_parameters"] = json.dumps(sampling, ensure_ascii=False)
    return {name: _encoded(name, value) if isinstance(value, str) else value for name, value in fields.items()}


def _encoded(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest({name: f"character {error.start} can't be written as UTF-8"}) from None
