"""What is asked: prompts from a seed, which adapter each takes, how many come at once. The same for every system.

A prompt consists of words that are one token each, so that its text and its token ids say the same to every front door. Every repetition
of every row has prompts of its own, so that no system can answer from a cache what it is to compute.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from bench.worker import GREEDY, Request
from jaxlora import int8_size
from jaxlora.text import Tokenizer

PRECISIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
}
"""The settings of each."""
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": int8_size.WEIGHT_BYTES}
MIXES = {"base": "base model", "one": "one adapter", "mixed": "16 adapters"}


@dataclasses.dataclass(frozen=True)
class Row:
    """So many streams arriving at once, each with `prompt` tokens and an answer of `answer` tokens. `mix` is one of MIXES."""

    prompt: int
    answer: int
    streams: int
    mix: str

    def __str__(self) -> str:
        streams = "1 stream" if self.streams == 1 else f"{self.streams} streams"
        return f"{self.prompt}/{self.answer}, {streams}, {MIXES[self.mix]}"


def rows(shapes: Sequence[tuple[int, int]], streams: Sequence[int], mixes: Sequence[str]) -> list[Row]:
    """Every combination that makes sense: one stream can't mix adapters."""
    return [
        Row(prompt, answer, count, mix)
        for prompt, answer in shapes
        for count in streams
        for mix in mixes
        if not (mix == "mixed" and count == 1)
    ]


class Prompts:
    """Prompts of a tokenizer, by seed; `sampling` is that of every request (see `bench.worker.Request`)."""

    def __init__(self, tokenizer: Tokenizer, sampling: Mapping[str, float] = GREEDY):
        self._tokenizer, self._sampling = tokenizer, sampling
        self._words = single_token_words(tokenizer)
        self._special = len(tokenizer.encode(""))

    def make(self, tokens: int, *seed: int) -> tuple[list[int], str]:
        """The token ids of a prompt and its text; other seeds give other prompts, which differ from the first token on.

        Raises:
            ValueError: the tokenizer reads the text otherwise.
        """
        text = self._tokenizer.decode(np.random.default_rng(seed).choice(self._words, tokens - self._special).tolist())
        ids = self._tokenizer.encode(text)
        if len(ids) != tokens:
            raise ValueError("this tokenizer does not read words one by one; the benchmark has no prompts for it")
        return ids, text

    def requests(self, row: Row, adapters: Sequence[str], repetition: int, answer: int | None = None) -> list[Request]:
        """The requests of one repetition of a row; `answer` shortens the answers, to warm up."""
        names = {"base": [""], "one": adapters[:1], "mixed": adapters}[row.mix]
        seed = repetition, row.streams, row.prompt, row.answer, list(MIXES).index(row.mix)
        made = (self.make(row.prompt, *seed, index) for index in range(row.streams))
        return [
            Request(ids, text, answer or row.answer, names[index % len(names)], self._sampling) for index, (ids, text) in enumerate(made)
        ]


def single_token_words(tokenizer: Tokenizer) -> np.ndarray:
    """Ids of the tokens that are a space and a lower-case English word."""
    found = []
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_text(token)
        if len(text) > 3 and text[0] == " " and text[1:].isascii() and text[1:].isalpha() and text.islower():
            found.append(token)
    return np.array(found)


def zipf(adapters: Sequence[str], count: int, seed: int) -> list[str]:
    """So many draws of adapters, the k-th with a probability proportional to 1 / k."""
    weights = 1.0 / np.arange(1, len(adapters) + 1)
    drawn = np.random.default_rng(seed).choice(len(adapters), count, p=weights / weights.sum())
    return [adapters[index] for index in drawn]
