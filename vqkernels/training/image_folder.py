"""Images in a folder: which files belong to which split and class, and their pixels, decoded when they are read."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqkernels.training.errors import UserError
from vqkernels.training.image_decoding import Color, WrongSize, decode_image, is_grey
from vqkernels.training.images import ImageSet, Splits

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first one present is the test split


class FolderSource:
    """Image files of one size.

    Args:
        paths: the files, at least one.
        labels: (N,) int64, or None.
        color: what they are converted to, not auto.
        reference: the file whose size all must have.
    """

    def __init__(self, paths: list[Path], labels: Tensor | None, color: Color, reference: Path) -> None:
        self.paths, self.labels, self.color, self._reference = paths, labels, color, reference
        height, width, channels = decode_image(reference, str(reference), color).shape
        self.shape = channels, height, width

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, start: int, stop: int) -> ImageSet:
        """See `images.Source.read`."""
        paths = self.paths[start:stop]
        channels, height, width = self.shape
        pixels = np.empty((len(paths), height, width, channels), dtype=np.uint8)
        for number, path in enumerate(paths):
            try:
                pixels[number] = decode_image(path, str(path), self.color, (width, height))
            except WrongSize as other:
                raise UserError(
                    f"images differ in size: {self._reference} is {width}x{height}, but {path} is {other}"
                ) from None
        labels = None if self.labels is None else self.labels[start:stop]
        return ImageSet(torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))), labels)


def open_folder(root: Path, color: Color = "auto") -> Splits:
    """All images below a folder; of each the header is read now, and the pixels when they are asked for.

    `root/*` are images without classes, `root/CLASS/**` images with classes, and `root/train/...` beside
    `root/test/...` (or val, validation) two splits of either kind. Classes are sorted by name, numbers by value.
    see `image_decoding.decode_image` for their pixels.

    Args:
        color: grey, rgb, rgba, or auto: grey if every image is, else rgb.

    Raises:
        UserError: there is no image, one cannot be read, or the layout is not one of these.
    """
    files = _list_images(root)
    if not files:
        raise UserError(f"the folder {root} holds no images ({', '.join(sorted(SUFFIXES))})")
    top = {path.relative_to(root).parts[0] if path.parent != root else "" for path in files}
    train_name = next((name for name in TRAIN_NAMES if name in top), None)
    if train_name is None or not top <= {*TRAIN_NAMES, *TEST_NAMES}:
        splits = [(root, files)]
    else:
        test_name = next((name for name in TEST_NAMES if name in top), None)
        names = [train_name] if test_name is None else [train_name, test_name]
        splits = [(root / name, [path for path in files if root / name in path.parents]) for name in names]

    classes = [_classes_of(folder, paths) for folder, paths in splits]
    class_names = tuple(sorted({name for name in classes[0] if name}, key=_natural))
    for (folder, _), names_found in zip(splits, classes, strict=True):
        unknown = sorted(set(names_found) - set(class_names) - ({""} if not class_names else set()))
        if unknown:
            where = f"the class {unknown[0]}" if unknown[0] else "images without a class"
            raise UserError(f"{folder} holds {where}, but {splits[0][0]} does not")

    everything = [path for _, paths in splits for path in paths]
    if color == "auto":
        color = "grey" if all(is_grey(path, str(path)) for path in everything) else "rgb"
    number = {name: label for label, name in enumerate(class_names)}
    sources = [
        FolderSource(
            paths, torch.tensor([number[name] for name in found]) if class_names else None, color, everything[0]
        )
        for (_, paths), found in zip(splits, classes, strict=True)
    ]
    return Splits(sources[0], sources[1] if len(sources) == 2 else None, class_names)


def read_image(path: Path, channels: int) -> Tensor:
    """Pixels (C, H, W) uint8 of one image file of 1, 3 or 4 channels, converted as those of a folder.

    Raises:
        UserError: it cannot be decoded.
    """
    color: Color = {1: "grey", 3: "rgb", 4: "rgba"}[channels]  # type: ignore[assignment]
    pixels = decode_image(path, str(path), color)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _list_images(root: Path) -> list[Path]:
    files = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                files.append(Path(folder, name))
    return files


def _classes_of(folder: Path, paths: list[Path]) -> list[str]:
    """The first folder below `folder` on the way to each image; "" for images right inside it."""
    names = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths]
    if "" in names and any(names):
        inside, beside = paths[names.index("")], next(path for path, name in zip(paths, names, strict=True) if name)
        raise UserError(
            f"{folder} holds images both directly and in class folders, such as {inside} and {beside}; "
            "give every image a class folder, or none"
        )
    return names


def _natural(name: str) -> tuple[bool, int, str]:
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)
