"""`vqkernels sample`: images from the prior of a run, as one PNG."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from vqkernels.training.build import load_models, pick_device
from vqkernels.training.checkpoint import ImageFormat
from vqkernels.training.errors import UserError
from vqkernels.training.pictures import image_grid, save_png
from vqkernels.training.stages import draw


@dataclass(frozen=True)
class SampleArguments:
    """Draw images from a trained prior."""

    run: Path
    """The run directory."""
    out: Path
    """The PNG file to write."""
    labels: tuple[str, ...] = field(default=())
    """Names of the classes to draw, one row each; all classes when left out."""
    count: int = 8
    """Images per class; for a prior without classes, images in all."""
    temperature: float = 1.0
    """The logits are divided by it: below 1 safer, above 1 wilder."""
    top_k: int | None = None
    """Draw among the k most likely codes only."""
    top_p: float | None = None
    """Draw among the fewest most likely codes whose probability reaches p."""
    seed: int = 0
    device: str = "auto"


def run(arguments: Sequence[str]) -> int:
    """Parse the arguments, draw and write."""
    parsed = tyro.cli(SampleArguments, prog="vqkernels sample", args=list(arguments))
    _check(parsed)
    device = pick_device(parsed.device)
    vqvae, prior, export = load_models(parsed.run, device)
    labels = _labels(parsed.labels, export.images)
    if labels is not None:
        labels = labels.repeat_interleave(parsed.count)
    images = draw(
        vqvae,
        prior,
        (export.images.height, export.images.width),
        parsed.count if labels is None else len(labels),
        labels=labels,
        generator=torch.Generator(device).manual_seed(parsed.seed),
        temperature=parsed.temperature,
        top_k=parsed.top_k,
        top_p=parsed.top_p,
        progress=True,
    )
    save_png(image_grid(images, 8 if labels is None else parsed.count), parsed.out)
    print(f"{len(images)} images are in {parsed.out}")
    return 0


def _check(arguments: SampleArguments) -> None:
    if arguments.count < 1:
        raise UserError(f"--count must be at least 1, but is {arguments.count}")
    if not arguments.temperature > 0:
        raise UserError(f"--temperature must be positive, but is {arguments.temperature}")
    if arguments.top_k is not None and arguments.top_k < 1:
        raise UserError(f"--top-k must be at least 1, but is {arguments.top_k}")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p must be in (0, 1], but is {arguments.top_p}")
    if arguments.out.suffix.lower() != ".png":
        raise UserError(f"--out must be a .png file, but is {arguments.out}")
    if arguments.out.is_dir():
        raise UserError(f"--out must be a .png file, but {arguments.out} is a folder")
    if not arguments.out.parent.is_dir():
        raise UserError(f"the folder {arguments.out.parent} for --out does not exist")


def _labels(names: tuple[str, ...], images: ImageFormat) -> torch.Tensor | None:
    if not images.class_names:
        if names:
            raise UserError("this prior was trained without classes; leave --labels out")
        return None
    unknown = [name for name in names if name not in images.class_names]
    if unknown:
        raise UserError(f"there is no class {unknown[0]!r}; the classes are: {', '.join(images.class_names)}")
    return torch.tensor([images.class_names.index(name) for name in names or images.class_names])
