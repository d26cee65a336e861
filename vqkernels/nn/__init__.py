"""Layers that a model swaps in."""

from . import export
from .orthogonal import OrthogonalRegularization, orthogonal_loss
from .simvq import SimVQ
from .vector_quantizer import VectorQuantizer

__all__ = ["OrthogonalRegularization", "SimVQ", "VectorQuantizer", "export", "orthogonal_loss"]
