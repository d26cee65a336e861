"""Linear maps of the channel axis, wherever it is: into the space of the codes and back."""

from torch import Tensor, nn


def project(linear: nn.Module | None, x: Tensor, channel_dim: int) -> Tensor:
    """Applies `linear` along `channel_dim` of x; without one, x itself."""
    return x if linear is None else channels_at(linear(x.movedim(channel_dim, -1)), channel_dim)


def channels_at(x: Tensor, channel_dim: int) -> Tensor:
    """x `(..., D)` with its channels at `channel_dim`, moved from an axis counted from the front, as ONNX wants it."""
    return x.movedim(x.dim() - 1, channel_dim)


def project_codes(linear: nn.Module, codes: Tensor, channel_dim: int = -1) -> Tensor:
    """Applies `linear` along `channel_dim` of codes, whose dtype may differ from the weight's.

    They are cast to the dtype of the weight. A quantized Linear takes float32 without a cast: its weight is not a
    floating tensor, or is a method.
    """
    weight = getattr(linear, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        codes = codes.to(weight.dtype)
    return project(linear, codes, channel_dim)
