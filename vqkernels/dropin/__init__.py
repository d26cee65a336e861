"""Layers with the constructors, results and checkpoints of the quantizers that people already use."""
