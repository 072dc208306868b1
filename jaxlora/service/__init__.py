"""What a request means: its fields and bounds, and the path from fields to answers. Knows no Triton.

Imports no JAX by itself, since the tokenizer and the launcher use parts of it; `jaxlora.service.service` does.
"""

from jaxlora.service.memory import check_length, memory_estimate

__all__ = ["check_length", "memory_estimate"]
