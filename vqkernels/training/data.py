"""Images from a source named by one string.

Sources: `digits` (1,797 scanned 8x8 digits that scikit-learn ships), a folder of images, an `.npz` or `.npy` file, IDX
files (a folder of them or one file), a folder of CIFAR-10 batches, `hf:NAME` through the `datasets` library. Models
see the pixels scaled to [-1, 1].
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from tqdm import tqdm

from vqkernels.training import array_files, cifar_files, hub_dataset, idx_files, image_folder
from vqkernels.training.errors import UserError
from vqkernels.training.image_decoding import Color
from vqkernels.training.images import ArraySource, ImageSet, Source, Splits

CHUNK = 256  # images read at a time


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
        """A hash of the training images and labels, which differs where a resumed run sees other data."""
        digest = hashlib.blake2b(repr((tuple(self.train.pixels.shape), self.class_names)).encode(), digest_size=16)
        digest.update(self.train.pixels.numpy().data)
        if self.train.labels is not None:
            digest.update(self.train.labels.numpy().data)
        return digest.hexdigest()


def open_source(source: str, *, color: Color = "auto") -> Splits:
    """The images of a source, to be read piece by piece.

    Args:
        source: `digits`; a folder of images, see `image_folder.open_folder`; an `.npy` or `.npz` file, see
            `array_files.open_arrays`; an IDX file or a folder of them; a folder of CIFAR-10 batches; or `hf:NAME`, see
            `hub_dataset.open_hub`.
        color: what encoded images (in folders, of `hf:`) are converted to. All others must agree with it as they are.

    Raises:
        UserError: the source does not exist, is empty, or is of no known kind.
    """
    path = Path(source)
    if source == "digits":
        bunch = load_digits()
        pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        splits = Splits(ArraySource(pixels, bunch.target, source), None, tuple(str(digit) for digit in range(10)))
    elif source.startswith(hub_dataset.PREFIX):
        return hub_dataset.open_hub(source, color)
    elif not path.exists():
        raise UserError(
            f"the data {source} does not exist (give 'digits', a folder of images, an .npz or .npy file, IDX files, "
            "CIFAR-10 batches or hf:NAME)"
        )
    elif path.is_dir() and cifar_files.cifar_batches(path):
        splits = cifar_files.open_cifar(path)
    elif path.is_dir() and idx_files.idx_files(path):
        splits = idx_files.open_idx(idx_files.idx_files(path))
    elif path.is_dir():
        return image_folder.open_folder(path, color)
    elif path.suffix in (".npz", ".npy"):
        splits = array_files.open_arrays(path)
    elif idx_files.IMAGES.search(path.name):
        splits = idx_files.open_idx([path])
    else:
        raise UserError(f"the data {source} is neither a folder nor an .npz, .npy or IDX file")
    found = {1: "grey", 3: "rgb", 4: "rgba"}[splits.train.shape[0]]
    if color not in ("auto", found):
        raise UserError(f"{source} is {found}, not {color}; only encoded images are converted")
    return splits


def resolved(source: str) -> str:
    """The source with a relative path made absolute."""
    if source.startswith(hub_dataset.PREFIX):
        return hub_dataset.resolved(source)
    return str(Path(source).resolve()) if source != "digits" and Path(source).exists() else source


def load_images(source: str, *, color: Color = "auto", held_out: float = 0.1, seed: int = 0) -> ImageData:
    """All images of a source in memory, so that one that cannot be read is found before training starts.

    Args:
        source, color: as in `open_source`.
        held_out: fraction held out at random, keyed by the seed, where the source has no test split.

    Raises:
        UserError: as in `open_source`; an image is unreadable, or images differ in size.
    """
    splits = open_source(source, color=color)
    train = _read_all(splits.train)
    if splits.test is not None:
        test = _read_all(splits.test)
    else:
        order = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(len(train)))
        count = min(round(held_out * len(train)), len(train) - 1)
        train, test = train.select(order[count:].sort().values), train.select(order[:count].sort().values)
    return ImageData(train, test, splits.class_names)


def _read_all(source: Source) -> ImageSet:
    pixels = torch.empty(len(source), *source.shape, dtype=torch.uint8)
    labels = torch.empty(len(source), dtype=torch.int64) if source.labelled else None
    with tqdm(total=len(source), desc="reading images", unit="image", leave=False, disable=None) as bar:
        for start in range(0, len(source), CHUNK):
            part = source.read(start, min(start + CHUNK, len(source)))
            pixels[start : start + len(part)] = part.pixels
            if labels is not None and part.labels is not None:
                labels[start : start + len(part)] = part.labels
            bar.update(len(part))
    return ImageSet(pixels, labels)
