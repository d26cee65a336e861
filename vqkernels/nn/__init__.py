"""Layers that a model swaps in."""

from .orthogonal import OrthogonalRegularization, orthogonal_loss
from .simvq import SimVQ
from .vector_quantizer import VectorQuantizer

__all__ = ["OrthogonalRegularization", "SimVQ", "VectorQuantizer", "orthogonal_loss"]
