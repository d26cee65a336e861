"""Layers that a model swaps in."""

from . import export
from .grouped import GroupedResidualVectorQuantizer
from .metrics import CodebookUsage
from .orthogonal import OrthogonalRegularization, orthogonal_loss
from .residual import ResidualVectorQuantizer
from .simvq import SimVQ
from .vector_quantizer import VectorQuantizer

__all__ = [
    "CodebookUsage",
    "GroupedResidualVectorQuantizer",
    "OrthogonalRegularization",
    "ResidualVectorQuantizer",
    "SimVQ",
    "VectorQuantizer",
    "export",
    "orthogonal_loss",
]
