"""From the fields of a request to the token ids of its prompt."""

from collections.abc import Mapping
from typing import Any

from jaxlora.errors import InvalidRequest
from jaxlora.text import Tokenizer
from jaxlora.text.chat import parse_messages


def prompt_ids(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> list[int]:
    """Token ids of `messages` through the chat template where they are sent, else of `text_input` as it is.

    Raises:
        InvalidRequest: neither is there, or one is malformed.
    """
    if "messages" in fields:
        return tokenizer.apply_chat_template(parse_messages(fields["messages"]))
    if "text_input" in fields:
        return tokenizer.encode(fields["text_input"])
    raise InvalidRequest({"text_input": "is missing; send it, or `messages`"})
