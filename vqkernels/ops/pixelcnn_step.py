"""One step of cached ancestral sampling from a gated PixelCNN: the whole stack at one position, as one operator.

The vertical stack advances when a step enters a grid row, the horizontal stack at every position. Whatever a later
position needs stays in the cache, so that a position costs a few small products over the batch, and a whole grid about
as much as one forward pass. The layout of weights and cache stands in vqkernels/backends/eager/pixelcnn_step.py.
"""

import torch
from torch import Tensor

from ..backends import registry
from ..backends.eager.pixelcnn_step import PixelCNNSizes, pack, panel_width
from .registration import Operation

__all__ = ["PixelCNNSizes", "advance", "pack", "panel_width", "pixelcnn_step"]


def _fake(*arguments: object) -> None:
    return None


pixelcnn_step = Operation(
    "pixelcnn_step",
    "(Tensor(a!) codes, Tensor(b!) cache, Tensor(c!) logits, Tensor weights, Tensor biases, Tensor? condition,"
    " Tensor noise, int[] sizes, bool residual_head, int begin, int end, float temperature, int top_k, float top_p,"
    " float guidance) -> ()",
    _fake,
)


def advance(
    sizes: PixelCNNSizes,
    codes: Tensor,
    cache: Tensor,
    logits: Tensor,
    weights: Tensor,
    biases: Tensor,
    condition: Tensor | None,
    noise: Tensor,
    *,
    residual_head: bool,
    begin: int,
    end: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    backend: str = "auto",
) -> None:
    """Draws the codes at the positions [begin, end), in raster order; every earlier position must have been advanced.

    Args:
        sizes: of the model.
        codes: (B, H, W) int64, written where they are negative; others are taken as given.
        cache: `sizes.cache_elements(R, W)` elements, zero before the first position; R is B, or 2B under guidance,
            where grid b is row 2b of the stack with its label and row 2b + 1 without.
        logits: (end - begin, R, K), written, or empty along its first axis where they are not wanted.
        weights: flat, from `pack`.
        biases: (layers, R, 4C): what the label adds to the vertical stack's gate, then the sum of all constant biases
            of the horizontal stack's gate.
        condition: (R, H, W, channels), or None.
        noise: (B, H, W) float64 in [0, 1), one number for each code.
        residual_head: whether a ReLU stands before the head.
        temperature, top_k, top_p, guidance: as in `vqkernels.backends.drawing`; top_k = 0 and top_p = 1 keep all.
        backend: "cpu" is one fused C++ kernel, "eager" a few PyTorch operations for each layer and position.

    Raises:
        ValueError: one sentence that names the argument, what was expected and what came.
    """
    if codes.dim() != 3 or codes.dtype != torch.int64:
        raise ValueError(f"codes must be (B, H, W) int64, got {list(codes.shape)} of {codes.dtype}")
    batch, height, width = codes.shape
    if not 0 <= begin <= end <= height * width:
        raise ValueError(f"begin and end must be positions of a {height} x {width} grid in order, got {begin}, {end}")
    rows = biases.shape[1] if biases.dim() == 3 else -1
    if rows not in (batch, 2 * batch):
        raise ValueError(f"biases must be (layers, {batch} or {2 * batch}, 4C), got {list(biases.shape)}")
    expected = {
        "biases": (biases, (sizes.layers, rows, 4 * sizes.channels)),
        "cache": (cache, (sizes.cache_elements(rows, width),)),
        "logits": (logits, ((end - begin) if len(logits) else 0, rows, sizes.num_codes)),
        "weights": (weights, (packed_elements(sizes, weights.dtype),)),
        "noise": (noise, (batch, height, width)),
    }
    if condition is not None:
        expected["condition"] = (condition, (rows, height, width, sizes.condition_channels))
    elif sizes.condition_channels:
        raise ValueError(f"condition must have {sizes.condition_channels} channels, got None")
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous of shape {list(shape)}, got {list(tensor.shape)}")
        wanted = torch.float64 if name == "noise" else weights.dtype
        if tensor.dtype != wanted:
            raise ValueError(f"{name} must be {wanted}, got {tensor.dtype}")
    if not codes.is_contiguous():
        raise ValueError("codes must be contiguous")
    if weights.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weights must be float32 or float64, got {weights.dtype}")
    chosen = registry.resolve(backend, codes.device, "pixelcnn_step")
    pixelcnn_step(
        chosen, codes, cache, logits, weights, biases, condition, noise, list(sizes), residual_head, begin, end,
        temperature, top_k, top_p, guidance,
    )  # fmt: skip


def packed_elements(sizes: PixelCNNSizes, dtype: torch.dtype) -> int:
    """Length of the flat weights."""
    panel = panel_width(dtype)
    return sum(-(-outputs // panel) * panel * inputs for _, inputs, outputs in sizes.matrices())
