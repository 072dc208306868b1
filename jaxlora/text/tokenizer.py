"""The tokenizer of a base model, from the files of its Hugging Face folder.

Reads tokenizer.json through the `tokenizers` library directly: importing Transformers for it would add a second to the start
of every process.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from jaxlora.errors import InvalidRequest, SetupError
from jaxlora.text.chat import ChatTemplate, check_messages, is_unicode
from jaxlora.text.pieces import Pieces

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back. Immutable, and safe to use from several threads.

    Attributes:
        vocab_size: number of ids that the tokenizer knows. A model's vocabulary may be padded beyond it; such ids decode to
            nothing.
        special_tokens: text of the tokens that have a role, by role: `bos_token`, `eos_token`, ...
        eos_token_ids: the tokenizer's own end of text, at most one. A model can stop on others too, see
            `ModelConfig.eos_token_ids`.
        pieces: how each id reads, for `Detokenizer`.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, special_tokens: Mapping[str, str] | None = None, chat_template: str | None = None
    ):
        """Wraps `tokenizer`, which nobody may change afterwards.

        Raises:
            SetupError: its decoder is of a kind that can't be streamed, or the chat template is not valid Jinja.
        """
        # A tokenizer.json can carry the truncation and padding of somebody's training run.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.special_tokens = dict(special_tokens or {})
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        eos = tokenizer.token_to_id(self.special_tokens["eos_token"]) if "eos_token" in self.special_tokens else None
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)
        self.pieces = Pieces(tokenizer)
        self._chat_template = ChatTemplate(chat_template, self.special_tokens) if chat_template else None

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "Tokenizer":
        """Reads tokenizer.json and, where they are, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

        Raises:
            SetupError: a file is missing, can't be read, or holds something that this class can't honour.
        """
        folder = pathlib.Path(folder)
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The library raises bare Exceptions.
        except Exception as error:
            raise SetupError(f"MODEL: tokenizer.json can't be read: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        named = {**_read_json(folder / "special_tokens_map.json"), **config}
        special = {name: _content(named[name]) for name in _SPECIAL_TOKENS if named.get(name)}
        template = folder / "chat_template.jinja"
        source = template.read_text(encoding="utf-8") if template.is_file() else _default_template(config.get("chat_template"))
        return cls(tokenizer, special, source)

    def encode(self, text: str, add_special_tokens: bool = True, field: str = "text_input") -> list[int]:
        """Token ids of `text`. The text of a special token inside it becomes that token, as in Transformers.

        Arguments:
            add_special_tokens: adds what the checkpoint puts around a text, for example a BOS token.
            field: the request's field that `text` came from, for the error.

        Raises:
            InvalidRequest: `text` is not valid Unicode.
        """
        if not is_unicode(text):
            raise InvalidRequest({field: "holds half of a surrogate pair, which is not valid Unicode"})
        # A megabyte of text takes most of a second. `encode` would hold the interpreter's lock for all of it; this gives it up.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` as a whole: special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_text(self, token_id: int) -> str:
        """How one token reads by itself, special tokens too: for log-probabilities. Bytes that are no whole character: U+FFFD."""
        return self.pieces.text(token_id)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt that the checkpoint's chat template makes of `messages` (`role` and `content` strings).

        Raises:
            InvalidRequest: under `messages`, what is wrong with them, or that this model has no chat template.
        """
        check_messages(messages)
        if self._chat_template is None:
            raise InvalidRequest({"messages": "this base model has no chat template; send `text_input`"})
        return self._chat_template.render(messages, add_generation_prompt)

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of `render_chat`; the template has put in the special tokens, so none are added."""
        rendered = self.render_chat(messages, add_generation_prompt)
        return self.encode(rendered, add_special_tokens=False, field="messages")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise SetupError(f"MODEL: {path.name} can't be read: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise SetupError(f"MODEL: {path.name} is not a JSON object")
    return content


def _content(token: Any) -> str:
    """The text of a special token, which the files give as a string or as an object."""
    return token["content"] if isinstance(token, dict) else str(token)


def _default_template(templates: Any) -> str | None:
    """The template of a tokenizer_config.json: a string, or a list of named ones, of which `default` counts."""
    if isinstance(templates, list):
        named = {entry["name"]: entry["template"] for entry in templates}
        return named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
    return templates
