"""Grids: every image in its place, enlarged by a whole factor; PNG files of every channel count."""

import numpy as np
import pytest
import torch
from PIL import Image

from vqkernels.training.pictures import GAP, image_grid, save_png, side_by_side


def tile(grid: torch.Tensor, row: int, column: int, height: int, width: int) -> torch.Tensor:
    top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
    return grid[:, top : top + height, left : left + width]


def test_images_are_laid_out_row_by_row():
    images = torch.rand(5, 3, 50, 60) * 2 - 1
    grid = image_grid(images, 2)
    assert grid.shape == (3, 3 * 52 + 2, 2 * 62 + 2) and grid.dtype == torch.uint8
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    assert all(torch.equal(tile(grid, n // 2, n % 2, 50, 60), pixels[n]) for n in range(5))
    assert tile(grid, 2, 1, 50, 60).eq(255).all()


def test_small_images_are_enlarged_and_values_clipped():
    grid = image_grid(torch.tensor([[[[-3.0, 0.0], [1.0, 9.0]]]]), 8)
    assert grid.shape == (1, 52, 52)
    assert tile(grid, 0, 0, 48, 48)[0, ::24, ::24].tolist() == [[0, 128], [255, 255]]


def test_reconstructions_stand_below_their_originals():
    originals, reconstructions = torch.full((3, 1, 48, 48), -1.0), torch.zeros(3, 1, 48, 48)
    grid = side_by_side(originals, reconstructions, 2)
    shades = [[int(tile(grid, row, column, 48, 48)[0, 0, 0]) for column in range(2)] for row in range(4)]
    assert shades == [[0, 0], [128, 128], [0, 255], [128, 255]]


@pytest.mark.parametrize("channels,mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_png_files_hold_the_grid(tmp_path, channels, mode):
    grid = torch.randint(256, (channels, 6, 7), dtype=torch.uint8)
    save_png(grid, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == mode and image.size == (7, 6)
        assert np.array_equal(np.asarray(image).reshape(6, 7, channels), grid.permute(1, 2, 0).numpy())
