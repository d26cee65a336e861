"""Layers that a model swaps in."""

from .vector_quantizer import VectorQuantizer

__all__ = ["VectorQuantizer"]
