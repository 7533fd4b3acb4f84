"""Training: the jitted step, the loop, checkpoints' contents, decoding and evaluation."""
