"""How much room an adapter takes on the device. No imports, so that those who only reckon with it need not load JAX."""

LORA_UNIT = 8
"""Ranks of an adapter in the bank, and the room for the columns of its B, are multiples of it."""


def fill_up(n: int) -> int:
    """n, or the next multiple of LORA_UNIT above it."""
    return -(-n // LORA_UNIT) * LORA_UNIT
