"""What a request means: its fields and bounds, and the path from fields to answers. Knows neither Triton nor JAX arrays."""
