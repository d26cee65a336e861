"""The residual layer over groups of channels: each group has its own stack (Yang et al. 2023, "HiFi-Codec")."""

from typing import Any

from .residual import ResidualVectorQuantizer


class GroupedResidualVectorQuantizer(ResidualVectorQuantizer):
    """`ResidualVectorQuantizer` whose channels are split among groups: all stacks in one operator call.

    Args:
        dim, codebook_size, levels: as there; dim is a multiple of `groups`, or `codebook_dim` is given.
        groups: G, at least 1.
        options: the other arguments of `ResidualVectorQuantizer`.

    `forward` gives indices `(..., G, Q)` and losses `(G, Q)`; with one group there is no axis G, as there.
    """

    def __init__(self, dim: int, codebook_size: int, levels: int, groups: int, **options: Any) -> None:
        super().__init__(dim, codebook_size, levels, groups=groups, **options)
