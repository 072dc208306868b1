"""Finds, starts, watches and stops a Triton Inference Server on this machine. Knows nothing of what the models compute."""
