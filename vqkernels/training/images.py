"""Images in memory, and sources that read them piece by piece: what training, encoding and evaluation are given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

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
        """The images at these indices, (B, C, H, W) float32 in [-1, 1]: pixel / 127.5 - 1."""
        return self.pixels[indices].to(device).float() / 127.5 - 1

    def select(self, indices: Tensor) -> "ImageSet":
        return ImageSet(self.pixels[indices], None if self.labels is None else self.labels[indices])


class Source(Protocol):
    """Images of one shape in a fixed order, read when they are asked for."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""

    @property
    def labelled(self) -> bool: ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> ImageSet:
        """Images start to stop.

        Raises:
            UserError: one of them cannot be read, or is of another shape.
        """


class Splits(NamedTuple):
    """What a source string names."""

    train: Source
    test: Source | None
    class_names: tuple[str, ...]  # empty: no labels


class ArraySource:
    """Images in an array, which may be mapped from a file: nothing is copied before it is read.

    Args:
        images: (N, H, W), (N, H, W, C) or (N, C, H, W), C one of 1, 3, 4; uint8, bool, or floating point in [0, 1].
        labels: N whole numbers from 0, or None.
        name, labels_name: what to call them in errors.

    Raises:
        UserError: a shape or a type is another.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray | None, name: str, labels_name: str = "the labels"
    ) -> None:
        shape = images.shape
        if images.ndim == 3:
            images = images[:, None]
        elif images.ndim == 4 and images.shape[3] in (1, 3, 4):
            images = images.transpose(0, 3, 1, 2)
        elif images.ndim != 4 or images.shape[1] not in (1, 3, 4):
            raise UserError(f"{name} must be (N, H, W), (N, H, W, C) or (N, C, H, W), but has shape {shape}")
        if 0 in images.shape:
            raise UserError(f"{name} is empty, its shape is {shape}")
        if images.dtype not in (np.uint8, np.bool_) and not np.issubdtype(images.dtype, np.floating):
            raise UserError(f"{name} must be uint8, bool or floating point, but is {images.dtype}")
        self._images, self._name, self.labels = images, name, None
        if labels is not None:
            labels = labels.reshape(-1)
            whole = np.issubdtype(labels.dtype, np.integer)
            if len(labels) != len(images) or not whole or labels.min() < 0 or labels.max() >= MAX_CLASSES:
                raise UserError(
                    f"{labels_name} must be {len(images)} whole numbers, one per image, from 0 and below {MAX_CLASSES}"
                )
            self.labels = torch.from_numpy(labels.astype(np.int64))

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self._images.shape
        return channels, height, width

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def __len__(self) -> int:
        return len(self._images)

    def read(self, start: int, stop: int) -> ImageSet:
        """See `Source.read`."""
        images = self._images[start:stop]
        if images.dtype == bool:
            images = images * np.uint8(255)
        elif np.issubdtype(images.dtype, np.floating):
            if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
                raise UserError(f"{self._name} is floating point and must lie in [0, 1]")
            images = np.rint(images * 255).astype(np.uint8)
        pixels = torch.from_numpy(np.array(images, order="C"))
        return ImageSet(pixels, None if self.labels is None else self.labels[start:stop])


class JoinedSource:
    """Several sources one after the other.

    Raises:
        UserError: their images differ in shape, or only some have labels.
    """

    def __init__(self, parts: Sequence[Source], name: str) -> None:
        if len({part.shape for part in parts}) != 1 or len({part.labelled for part in parts}) != 1:
            raise UserError(f"the parts of {name} differ in image size, or only some of them have labels")
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._parts[0].shape

    @property
    def labelled(self) -> bool:
        return self._parts[0].labelled

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> ImageSet:
        """See `Source.read`."""
        read = [
            part.read(max(start - first, 0), min(stop - first, len(part)))
            for part, first in zip(self._parts, self._starts, strict=False)
            if first < stop and start < first + len(part)
        ]
        if len(read) == 1:
            return read[0]
        pixels = torch.cat([part.pixels for part in read]) if read else torch.empty(0, *self.shape, dtype=torch.uint8)
        if not self.labelled:
            return ImageSet(pixels, None)
        labels = [part.labels for part in read if part.labels is not None]
        return ImageSet(pixels, torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64))
