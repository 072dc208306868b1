"""What serving and training share. Knows neither Triton nor a training loop."""
