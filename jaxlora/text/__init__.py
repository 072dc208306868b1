"""Text on one side, token ids on the other: tokenizer, chat template, incremental detokenisation, stop strings.

Knows Hugging Face tokenizer files. Does not know the model, a request's limits or Triton.
"""

from jaxlora.text.chat import parse_messages
from jaxlora.text.detokenizer import Detokenizer
from jaxlora.text.stop_strings import StopStrings
from jaxlora.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "StopStrings", "Tokenizer", "parse_messages"]
