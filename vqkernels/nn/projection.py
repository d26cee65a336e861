"""Linear maps of the channel axis, wherever it is: into the space of the codes and back."""

from torch import Tensor, nn


def project(linear: nn.Linear | None, x: Tensor, channel_dim: int) -> Tensor:
    """Applies `linear` along `channel_dim` of x; without one, x itself."""
    return x if linear is None else linear(x.movedim(channel_dim, -1)).movedim(-1, channel_dim)
