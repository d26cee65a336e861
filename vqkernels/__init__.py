"""Fused, exact kernels for vector quantization. The public names are those in `__all__`."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from .dropin.swap import restore_quantizers, swap_quantizers

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
    "restore_quantizers",
    "sample_code",
    "swap_quantizers",
    "use_backend",
    "vector_quantize",
]


def __getattr__(name: str) -> Any:
    """The names that are imported when they are asked for."""
    if name in ("restore_quantizers", "swap_quantizers"):
        from .dropin import swap

        return getattr(swap, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
