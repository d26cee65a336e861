"""Images from a source named by one string, held in memory as 8-bit pixels.

Sources: `digits` (1,797 scanned 8x8 digits that scikit-learn ships), a folder of images, an `.npz` or `.npy` file.
Models see the pixels scaled to [-1, 1]: pixel / 127.5 - 1.
"""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from vqkernels.training import image_folder
from vqkernels.training.errors import UserError

MAX_CLASSES = 100_000


@dataclass(frozen=True)
class ImageSet:
    """Pixels (N, C, H, W) uint8, and labels (N,) int64 or None."""

    pixels: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def batch(self, indices: Tensor | slice, device: torch.device | str = "cpu") -> Tensor:
        """The images at these indices, (B, C, H, W) float32 in [-1, 1]."""
        return self.pixels[indices].to(device).float() / 127.5 - 1

    def select(self, indices: Tensor) -> "ImageSet":
        return ImageSet(self.pixels[indices], None if self.labels is None else self.labels[indices])


@dataclass(frozen=True)
class ImageData:
    """A training set, a held-out set of the same shape (it may be empty), and the names of the classes."""

    train: ImageSet
    held_out: ImageSet
    class_names: tuple[str, ...]  # empty: no labels

    @property
    def channels(self) -> int:
        return self.train.pixels.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.train.pixels.shape[2], self.train.pixels.shape[3]

    def fingerprint(self) -> str:
        """A hash of the training images and labels, which tells whether a resumed run sees the same data."""
        digest = hashlib.blake2b(repr((tuple(self.train.pixels.shape), self.class_names)).encode(), digest_size=16)
        digest.update(self.train.pixels.numpy().data)
        if self.train.labels is not None:
            digest.update(self.train.labels.numpy().data)
        return digest.hexdigest()


def load_images(source: str, *, color: image_folder.Color = "auto", held_out: float = 0.1, seed: int = 0) -> ImageData:
    """Load all images of a source.

    Args:
        source: `digits`; a folder, see `image_folder.read_folder`; a `.npy` file of images, or an `.npz` file with
            the arrays `images` and (optionally) `labels`, or `x_train`, `y_train`, `x_test`, `y_test`. Images are
            (N, H, W), (N, H, W, C) or (N, C, H, W): 8-bit, boolean, or floating point in [0, 1].
        color: what the images are converted to. Arrays are taken as they are, and must agree with it.
        held_out: fraction held out at random, keyed by the seed, where the source has no test split.

    Raises:
        UserError: the source does not exist, is empty or unreadable, or its images differ in size.
    """
    path = Path(source)
    if source == "digits":
        bunch = load_digits()
        pixels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
        train = ImageSet(_colored(pixels, color, source), torch.from_numpy(bunch.target.astype(np.int64)))
        test, names = None, tuple(str(digit) for digit in range(10))
    elif not path.exists():
        raise UserError(
            f"the data {source} does not exist (give 'digits', a folder of images, or an .npz or .npy file)"
        )
    elif path.is_dir():
        folder = image_folder.read_folder(path, color)
        train = ImageSet(*folder.train)
        test, names = None if folder.test is None else ImageSet(*folder.test), folder.class_names
    elif path.suffix in (".npz", ".npy"):
        train, test, names = _read_arrays(path, color)
    else:
        raise UserError(f"the data {source} is neither a folder nor an .npz or .npy file")
    if test is None:
        order = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(len(train)))
        count = min(round(held_out * len(train)), len(train) - 1)
        train, test = train.select(order[count:].sort().values), train.select(order[:count].sort().values)
    return ImageData(train, test, names)


def _read_arrays(path: Path, color: image_folder.Color) -> tuple[ImageSet, ImageSet | None, tuple[str, ...]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"images": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a NumPy file: {error}") from error
    test = None
    if "images" in arrays:
        train = _image_set(path, arrays, "images", "labels", color)
    elif "x_train" in arrays:
        train = _image_set(path, arrays, "x_train", "y_train", color)
        if "x_test" in arrays:
            test = _image_set(path, arrays, "x_test", "y_test", color)
            if test.pixels.shape[1:] != train.pixels.shape[1:] or (test.labels is None) != (train.labels is None):
                raise UserError(f"{path}: x_test and x_train differ in image size, or only one of them has labels")
    else:
        raise UserError(f"{path} has no array 'images' or 'x_train' (it has: {', '.join(arrays) or 'nothing'})")
    if train.labels is None:
        return train, test, ()
    labels = train.labels if test is None or test.labels is None else torch.cat([train.labels, test.labels])
    return train, test, tuple(str(label) for label in range(int(labels.max()) + 1))


def _image_set(path: Path, arrays: dict[str, np.ndarray], x: str, y: str, color: image_folder.Color) -> ImageSet:
    images = arrays[x]
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3, 4):
        images = images.transpose(0, 3, 1, 2)
    elif images.ndim != 4 or images.shape[1] not in (1, 3, 4):
        raise UserError(f"{path}: {x} must be (N, H, W), (N, H, W, C) or (N, C, H, W), but has shape {images.shape}")
    if 0 in images.shape:
        raise UserError(f"{path}: {x} is empty, its shape is {arrays[x].shape}")
    if images.dtype == bool:
        images = images * np.uint8(255)
    elif np.issubdtype(images.dtype, np.floating):
        if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
            raise UserError(f"{path}: {x} is floating point and must lie in [0, 1]")
        images = np.rint(images * 255).astype(np.uint8)
    elif images.dtype != np.uint8:
        raise UserError(f"{path}: {x} must be uint8, bool or floating point, but is {images.dtype}")
    pixels = _colored(torch.from_numpy(np.ascontiguousarray(images)), color, f"{path}: {x}")
    if y not in arrays:
        return ImageSet(pixels, None)
    labels = arrays[y].reshape(-1)
    whole = np.issubdtype(labels.dtype, np.integer)
    if len(labels) != len(pixels) or not whole or labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise UserError(
            f"{path}: {y} must be {len(pixels)} whole numbers, one per image, from 0 and below {MAX_CLASSES}"
        )
    return ImageSet(pixels, torch.from_numpy(labels.astype(np.int64)))


def _colored(pixels: Tensor, color: image_folder.Color, name: str) -> Tensor:
    """Pixels (N, C, H, W) as they are, if they agree with the color."""
    found = {1: "grey", 3: "rgb", 4: "rgba"}[pixels.shape[1]]
    if color not in ("auto", found):
        raise UserError(f"{name} is {found}, not {color}; only images in folders are converted")
    return pixels
