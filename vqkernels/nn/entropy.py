"""The entropy penalty of a layer: decided rows, and a codebook of which all is used."""

from torch import Tensor

from ..ops.entropy import entropy_loss
from .rows import Rows


def entropy_penalty(
    rows: Rows, codes: Tensor, metric: str, weight: float, gamma: float, temperature: float | Tensor, backend: str
) -> Tensor:
    """`weight * (sample_entropy - gamma * codebook_entropy)`, 0-d, the mean over separate codebooks.

    `metric` is "euclidean" or "dot"; for a cosine, rows and codes are of length one and the metric is "dot".
    """
    sample, whole = entropy_loss(
        rows.values, codes, temperature, mask=rows.mask, metric=metric, channel_dim=rows.channel_dim, backend=backend
    )
    return weight * (sample - gamma * whole).mean()
