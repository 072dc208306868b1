"""How large weights of 8 bits are. Plain arithmetic, for those too who only want to know and not to load JAX."""

GROUP = 32
"""Values of k that share a scale; kGroup in native/src/kernels.h."""

WEIGHT_BYTES = 1 + 2 / GROUP
"""Of a weight, with its share of a scale in bfloat16."""

SCALE_BYTES = 4
"""Of a rank of an adapter: A and B of a module share a float32 scale for each."""
