"""`vqkernels sample`: draws images from the prior of a run, or completes an image, into a PNG or an .npz file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from vqkernels.models import VQVAE
from vqkernels.training.checkpoint import ImageFormat, write_atomically
from vqkernels.training.errors import UserError
from vqkernels.training.image_folder import read_image
from vqkernels.training.model_building import load_models, pick_device
from vqkernels.training.pictures import image_grid, save_png, to_pixels
from vqkernels.training.stages import decode, draw_codes


@dataclass(frozen=True)
class SampleArguments:
    """Draw images from a trained prior, or complete an image."""

    run: Path
    """The run directory of 'vqkernels train'."""
    out: Path
    """The file to write: a .png with a grid; or an .npz with images (N, H, W, C), codes (N, h, w) and labels (N,)."""
    labels: tuple[str, ...] = field(default=())
    """Names of the classes to draw, one row of the grid each. Default: all classes."""
    count: int = 8
    """Images per class; without classes, images in all."""
    complete: Path | None = None
    """Keep the upper part of this image and draw the rest. The image comes first in every row of the grid."""
    rows: float = 0.5
    """With --complete: the fraction of the rows of codes to keep."""
    temperature: float = 1.0
    """The logits are divided by it. Below 1 samples are more likely, above 1 more varied."""
    top_k: int | None = None
    """Draw among the k most likely codes alone."""
    top_p: float | None = None
    """Draw among the most likely codes alone, as few as have probability p together."""
    guidance: float = 1.0
    """Above 1 samples follow the label more strongly. The prior must be trained with prior.label_dropout."""
    seed: int = 0
    """Seed of the draws."""
    device: str = "auto"
    """auto: cuda if there is a GPU, else cpu."""


def run(arguments: Sequence[str]) -> int:
    """Parse the arguments, draw and write."""
    parsed = tyro.cli(SampleArguments, prog="vqkernels sample", args=list(arguments))
    _check(parsed)
    device = pick_device(parsed.device)
    vqvae, prior, export = load_models(parsed.run, device)
    if parsed.guidance != 1.0 and not prior.label_dropout > 0:
        raise UserError("--guidance needs a prior trained with classes and prior.label_dropout above 0")
    size = (export.images.height, export.images.width)
    labels = _labels(parsed.labels, export.images)
    if labels is not None:
        labels = labels.repeat_interleave(parsed.count)
    count = parsed.count if labels is None else len(labels)
    original, known = None, None
    if parsed.complete is not None:
        original, known = _complete(parsed.complete, parsed.rows, vqvae, export.images, device)
        known = known.expand(count, -1, -1)
    codes = draw_codes(
        vqvae,
        prior,
        size,
        count,
        labels=labels,
        generator=torch.Generator(device).manual_seed(parsed.seed),
        temperature=parsed.temperature,
        top_k=parsed.top_k,
        top_p=parsed.top_p,
        guidance=parsed.guidance,
        known=known,
        progress=True,
    )
    images = decode(vqvae, codes, size)
    if parsed.out.suffix.lower() == ".npz":
        _save_arrays(parsed.out, images, codes, labels)
    else:
        columns = 8 if labels is None else parsed.count
        save_png(_grid(images, columns, original), parsed.out)
    print(f"{count} images are in {parsed.out}")
    return 0


def _complete(
    path: Path, rows: float, vqvae: VQVAE, images: ImageFormat, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The image (1, C, H, W) in [-1, 1], and its codes (1, h, w) with -1 below the rows that are kept."""
    pixels = read_image(path, images.channels)
    if tuple(pixels.shape[1:]) != (images.height, images.width):
        raise UserError(
            f"--complete must be {images.width}x{images.height} like the images of the run, but {path} is "
            f"{pixels.shape[2]}x{pixels.shape[1]}"
        )
    original = pixels[None].to(device).float() / 127.5 - 1
    with torch.no_grad():
        known = vqvae.encode(original)
    known[:, math.ceil(rows * known.shape[1]) :] = -1
    return original, known


def _grid(images: Tensor, columns: int, original: Tensor | None) -> Tensor:
    """The grid of images. If there is an original, it begins every row."""
    if original is None:
        return image_grid(images, columns)
    parts = [part for row in images.split(columns) for part in (original, row)]
    return image_grid(torch.cat(parts), min(columns, len(images)) + 1)


def _save_arrays(path: Path, images: Tensor, codes: Tensor, labels: Tensor | None) -> None:
    arrays: dict[str, Any] = {"images": to_pixels(images).permute(0, 2, 3, 1).numpy(), "codes": codes.cpu().numpy()}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def _check(arguments: SampleArguments) -> None:
    if arguments.count < 1:
        raise UserError(f"--count must be at least 1, but is {arguments.count}")
    if not arguments.temperature > 0:
        raise UserError(f"--temperature must be positive, but is {arguments.temperature}")
    if arguments.top_k is not None and arguments.top_k < 1:
        raise UserError(f"--top-k must be at least 1, but is {arguments.top_k}")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p must be in (0, 1], but is {arguments.top_p}")
    if not 0 <= arguments.rows <= 1:
        raise UserError(f"--rows must be in [0, 1], but is {arguments.rows}")
    if arguments.complete is not None and not arguments.complete.is_file():
        raise UserError(f"the image {arguments.complete} for --complete does not exist")
    if arguments.out.suffix.lower() not in (".png", ".npz"):
        raise UserError(f"--out must be a .png file, or an .npz file, but is {arguments.out}")
    if arguments.out.is_dir():
        raise UserError(f"--out must be a .png file, or an .npz file, but {arguments.out} is a folder")
    if not arguments.out.parent.is_dir():
        raise UserError(f"the folder {arguments.out.parent} for --out does not exist")


def _labels(names: tuple[str, ...], images: ImageFormat) -> Tensor | None:
    if not images.class_names:
        if names:
            raise UserError("this prior was trained without classes; leave --labels out")
        return None
    unknown = [name for name in names if name not in images.class_names]
    if unknown:
        raise UserError(f"there is no class {unknown[0]!r}; the classes are: {', '.join(images.class_names)}")
    return torch.tensor([images.class_names.index(name) for name in names or images.class_names])
