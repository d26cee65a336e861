"""The passes of a PixelCNN's head in plain PyTorch. Shapes stand in csrc/cpu/pixelcnn_head.h."""

from torch import Tensor
from torch.nn import functional as F


def rectify(x: Tensor, bias: Tensor, grids: int) -> Tensor:
    return F.relu(x + bias)


def rectify_backward(grad: Tensor, hidden: Tensor, grids: int) -> tuple[Tensor, Tensor]:
    """The gradient of x, and its sums over each grid."""
    found = grad.masked_fill(hidden <= 0, 0)
    return found, found.view(grids, found.shape[0] // max(grids, 1), found.shape[1]).sum(1)


def planes(x: Tensor, bias: Tensor, grid: list[int]) -> Tensor:
    return (x + bias).view(*grid, x.shape[1]).permute(0, 3, 1, 2).contiguous()


def planes_backward(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the rows, and its sums over each grid."""
    return grad.permute(0, 2, 3, 1).flatten(0, 2).contiguous(), grad.sum((2, 3))
