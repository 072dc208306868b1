"""Guesses from the text so far: where its last tokens stood before, what followed them there may follow again.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding). Answers that quote, edit or extract from
their prompt, and those that repeat themselves, are guessed well; others cost little, as wrong guesses make for fewer of them. Knows
tokens only.
"""

from collections.abc import Sequence

NGRAMS = (3, 2)  # the longest first
LONGEST_PAUSE = 32  # tokens without a guess after many that were wrong


class Lookup:
    """The guesses for one sequence. `prompt` comes before its answer."""

    def __init__(self, prompt: Sequence[int]):
        self._prompt_length = len(prompt)
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # by the tokens of an n-gram: where what followed its last occurrence begins
        self._pause = self._left = 0
        self._extend(prompt)

    def guess(self, answer: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may come next. `answer` begins with what it was at the call before."""
        self._extend(answer[len(self._tokens) - self._prompt_length :])
        if self._left:
            self._left -= 1
            return []
        for length in NGRAMS:
            at = self._after.get(tuple(self._tokens[-length:]))
            if at is not None:
                return self._from(at, most)
        return []

    def learn(self, right: int) -> None:
        """How many of the tokens of the last guess were right."""
        self._pause = 0 if right else min(2 * self._pause + 1, LONGEST_PAUSE)
        self._left = self._pause

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for length in NGRAMS:
                if len(self._tokens) >= length:
                    self._after[tuple(self._tokens[-length:])] = len(self._tokens)
            self._tokens.append(token)

    def _from(self, at: int, most: int) -> list[int]:
        # What repeats itself goes on beyond the end.
        found: list[int] = []
        for place in range(at, at + most):
            found.append(self._tokens[place] if place < len(self._tokens) else found[place - len(self._tokens)])
        return found
