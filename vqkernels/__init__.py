"""Fused, exact kernels for vector quantization. The public names are those in `__all__`."""

from . import nn, reference
from .backends.registry import use_backend
from .ops.entropy import entropy_loss
from .ops.kmeans import kmeans
from .ops.nearest import nearest_code
from .ops.quantize import VectorQuantizeFunction, vector_quantize
from .ops.residual import ResidualVectorQuantizeFunction, residual_vector_quantize
from .ops.sample import sample_code
from .ops.statistics import codebook_statistics
from .version import __version__

__all__ = [
    "ResidualVectorQuantizeFunction",
    "VectorQuantizeFunction",
    "__version__",
    "codebook_statistics",
    "entropy_loss",
    "kmeans",
    "nearest_code",
    "nn",
    "reference",
    "residual_vector_quantize",
    "sample_code",
    "use_backend",
    "vector_quantize",
]
