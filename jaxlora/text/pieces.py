"""What each token id adds to a text: the tokenizer's decoder, taken apart so that it can run token by token.

`tokenizers` decodes a list of ids as a whole. Its decoders for the supported model families reduce to two rules, each with little
state between tokens; the decoders' source is `tokenizers/src/decoders/` and `pre_tokenizers/{byte_level,metaspace}.rs` of
https://github.com/huggingface/tokenizers. A decoder of another kind is refused by name when the tokenizer is loaded.

Byte level (GPT-2, Llama 3, Qwen, SmolLM): every token is a string of bytes; the bytes of all tokens together are UTF-8.
Pieces (SentencePiece: Llama 2, Mistral): a token is text, or one byte `<0xE2>`. The bytes that stand in a row are text if
together they are UTF-8, else each is U+FFFD: so none of them is certain before the row ends.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import tokenizers

from jaxlora.errors import SetupError

_utf8 = codecs.getincrementaldecoder("utf-8")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class State(Protocol):
    """The decoder between two tokens."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Pieces:
    """The pieces of one tokenizer's vocabulary, worked out when they are first needed.

    Raises:
        SetupError: the tokenizer's decoder is of a kind that is not known here.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._skipped = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        self._known: dict[int, bytes | str | None] = {}
        steps = _steps(tokenizer)
        self._stages: list[Callable[[str, bool], str]] = []
        self._strip: tuple[str, int] = ("", 0)
        self._byte_fallback = False
        self._byte_level = [step["type"] for step in steps] == ["ByteLevel"]
        if not self._byte_level:
            self._read_steps(steps)

    def start(self, prompt_ids: Sequence[int]) -> State:
        """The decoder's state after `prompt_ids`, of which only the end is looked at."""
        return _ByteLevel(self, prompt_ids) if self._byte_level else _Sequence(self, prompt_ids, *self._strip)

    def get(self, token_id: int) -> bytes | str | None:
        """Bytes or text of a token that is not a text's first; None for a special or unknown one, which adds nothing."""
        try:
            return self._known[token_id]
        except KeyError:
            piece = self._known[token_id] = self._read(token_id)
            return piece

    def first(self, token_id: int) -> bytes | str | None:
        """The same for the first token of a text."""
        piece = self.get(token_id)
        return self._staged(self._tokenizer.id_to_token(token_id), first=True) if isinstance(piece, str) else piece

    def text(self, token_id: int) -> str:
        """How the token reads by itself, special tokens too; empty for an unknown id."""
        piece = self.get(token_id)
        if piece is None:
            return self._tokenizer.id_to_token(token_id) or ""
        return piece.decode("utf-8", "replace") if isinstance(piece, bytes) else piece

    def visible(self, ids: Sequence[int]) -> Iterator[bytes | str]:
        """The pieces of `ids` from the last to the first, without those that add nothing."""
        return (piece for token_id in reversed(ids) if (piece := self.get(int(token_id))) is not None)

    def _read(self, token_id: int) -> bytes | str | None:
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None or token in self._skipped:
            return None
        if self._byte_level:
            return _bytes(token)
        text = self._staged(token, first=False)
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(text)):
            return bytes.fromhex(byte[1])
        return text

    def _staged(self, token: str, first: bool) -> str:
        for stage in self._stages:
            token = stage(token, first)
        return token

    def _read_steps(self, steps: list[dict[str, Any]]) -> None:
        """Any number of text steps, then byte fallback, fusing and stripping, each at most once."""
        left = list(steps)
        while left and (stage := _text_stage(left[0])):
            self._stages.append(stage)
            left.pop(0)
        if left and left[0]["type"] == "ByteFallback":
            self._byte_fallback = True
            left.pop(0)
        if left and left[0]["type"] == "Fuse":
            left.pop(0)
            if left and left[0]["type"] == "Strip" and not left[0]["stop"]:
                self._strip = (left[0]["content"], left[0]["start"])
                left.pop(0)
        if left or not steps:
            names = ", ".join(step["type"] for step in steps) or "none"
            raise SetupError(
                f"MODEL: the tokenizer's decoder can't be streamed (its steps: {names}); known are ByteLevel, and Replace or "
                "Metaspace followed by ByteFallback, Fuse and Strip at the start"
            )


class _ByteLevel:
    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int]):
        self._get = pieces.get
        self._decoder = _utf8("replace")
        tail = b""
        # An unfinished character has at most three bytes, and one always shows where it begins.
        for piece in pieces.visible(prompt_ids):
            tail = piece + tail
            if len(tail) >= 3:
                break
        self._decoder.decode(tail)

    def push(self, token_id: int) -> str:
        piece = self._get(token_id)
        return self._decoder.decode(piece) if piece else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Sequence:
    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int], strip: str, strip_count: int):
        self._pieces = pieces
        self._strip, self._strip_left = strip, strip_count
        self._first = True
        self._row = b""
        for piece in pieces.visible(prompt_ids):
            self._first, self._strip_left = False, 0
            if isinstance(piece, str):
                break
            self._row = piece + self._row
        # Whole characters of the prompt are the prompt's; one that it leaves unfinished is ours.
        decoder = _utf8("replace")
        decoder.decode(self._row)
        self._row = decoder.getstate()[0]

    def push(self, token_id: int) -> str:
        piece = self._pieces.first(token_id) if self._first else self._pieces.get(token_id)
        if piece is None:
            return ""
        self._first = False
        if isinstance(piece, bytes):
            self._row += piece
            return ""
        return self._stripped(self._end_row() + piece)

    def flush(self) -> str:
        return self._stripped(self._end_row())

    def _end_row(self) -> str:
        row, self._row = self._row, b""
        try:
            return row.decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(row)

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._strip:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


def _steps(tokenizer: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder as a flat list of its steps, each as tokenizer.json writes it."""

    def flat(step: dict[str, Any]) -> list[dict[str, Any]]:
        return [inner for part in step["decoders"] for inner in flat(part)] if step["type"] == "Sequence" else [step]

    return flat(json.loads(tokenizer.decoder.__getstate__())) if tokenizer.decoder else []


def _text_stage(step: dict[str, Any]) -> Callable[[str, bool], str] | None:
    """A step that changes each token's text by itself, as a function of the text and whether the token is the first."""
    if step["type"] == "Replace" and "String" in step["pattern"]:
        old, new = step["pattern"]["String"], step["content"]
        return lambda token, first: token.replace(old, new)
    if step["type"] == "Metaspace":
        mark, prepends = step["replacement"], step.get("prepend_scheme", "always") != "never"
        return lambda token, first: token.replace(mark, "" if first and prepends else " ")
    return None


def _byte_alphabet() -> dict[str, int]:
    """The character by which GPT-2's byte level writes each byte: https://github.com/openai/gpt-2/blob/master/src/encoder.py"""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for; one that holds any other character stands for its own text."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()
