"""Grids of images, as tensors and PNG files."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vqkernels.training.checkpoint import write_atomically

TILE = 48  # pixels: smaller images are enlarged by a whole factor to at least this
GAP = 2  # pixels between images


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, on the CPU."""
    return ((images.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Lay out images (N, C, H, W) in [-1, 1] row by row; returns (C, height, width) uint8."""
    pixels = to_pixels(images)
    scale = max(1, -(-TILE // max(pixels.shape[2:])))
    pixels = pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    count, channels, height, width = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = torch.full((channels, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP), 255, dtype=torch.uint8)
    for number, image in enumerate(pixels):
        top, left = (number // columns) * (height + GAP) + GAP, (number % columns) * (width + GAP) + GAP
        grid[:, top : top + height, left : left + width] = image
    return grid


def side_by_side(originals: Tensor, reconstructions: Tensor, columns: int) -> Tensor:
    """A grid of rows of originals (N, C, H, W), each above a row of their reconstructions."""
    missing = -len(originals) % columns
    both = torch.stack(
        [
            F.pad(images.cpu(), (0, 0, 0, 0, 0, 0, 0, missing), value=1.0).unflatten(0, (-1, columns))
            for images in (originals, reconstructions)
        ],
        dim=1,
    )
    return image_grid(both.flatten(0, 2), columns)


def save_png(grid: Tensor, path: Path) -> None:
    """Write a grid (C, H, W) uint8 of 1, 3 or 4 channels."""
    array = grid.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    write_atomically(path, lambda file: image.save(file, format="PNG"))
