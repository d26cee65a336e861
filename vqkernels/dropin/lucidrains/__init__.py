"""Drop-ins for lucidrains' vector-quantize-pytorch, 1.32: change the import, keep the model and its checkpoints.

    from vqkernels.dropin.lucidrains import VectorQuantize  # was: from vector_quantize_pytorch import VectorQuantize

`VectorQuantize`, `ResidualVQ`, `GroupedResidualVQ` and `SimVQ` have the peer's arguments, defaults, results and state
dicts. An option without a counterpart is refused by name, never ignored.
"""

from .adoption import ADAPTERS, RELEASERS
from .layer import LossBreakdown, VectorQuantize
from .residual import GroupedResidualVQ, ResidualVQ
from .simvq import SimVQ

__all__ = ["ADAPTERS", "RELEASERS", "GroupedResidualVQ", "LossBreakdown", "ResidualVQ", "SimVQ", "VectorQuantize"]
