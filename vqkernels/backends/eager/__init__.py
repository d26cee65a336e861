"""The fallback: every operator in plain PyTorch, on any device, one file an operator and what belongs to it."""
