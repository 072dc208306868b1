"""Base model checkpoints: from the name that a user gives to an ordinary Hugging Face folder on this machine.

Knows where checkpoints come from and how a GGUF file becomes such a folder. Does not know the forward pass, the device or Triton:
`jaxlora.config` and `jaxlora.weights` read the folder, `jaxlora.text` its tokenizer.
"""

from jaxlora.checkpoint.sources import resolve

__all__ = ["resolve"]
