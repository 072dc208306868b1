"""Token ids to text while they are being generated."""

from collections.abc import Sequence

from jaxlora.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one answer, token by token, in constant time for each.

    What `push` returned so far, followed by `flush`, is exactly `tokenizer.decode` of all pushed ids. With a prompt it is
    what the answer adds to the prompt's text, so a leading space stays. Only text that no later token can change is returned:
    the bytes of a character that is not complete are held back.

    Arguments:
        tokenizer: the base model's.
        prompt_ids: ids that stand before the answer. A character that they leave unfinished counts to the answer.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()):
        self._state = tokenizer.pieces.start(prompt_ids)

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; empty for a special token."""
        return self._state.push(token_id)

    def flush(self) -> str:
        """What was still held back, when no token follows."""
        return self._state.flush()
