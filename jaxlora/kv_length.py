"""How long the key/value cache of a slot is. Plain arithmetic, for those too who only want to know and not to load JAX."""

BLOCK = 128
"""Positions that attention takes at a time."""


def cache_length(max_seq_len: int, chunk: int) -> int:
    """Positions in the cache: whole chunks for the longest sequence, and a scratch stretch that idle rows write to."""
    step = max(chunk, BLOCK)
    return -(-max_seq_len // step) * step + step
