"""How good a model of the scanned digits is, judged by a classifier that was trained on the real ones.

The judge is a support vector machine trained on the real training images. Reconstructions are of held-out images,
which neither the judge nor the models have seen; samples are drawn from the prior for a digit that is asked for.
"""

from typing import NamedTuple

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from vqkernels.models import VQVAE, Prior
from vqkernels.nn import metrics
from vqkernels.training.data import ImageData
from vqkernels.training.errors import UserError
from vqkernels.training.stages import draw, encode


class Figure(NamedTuple):
    """A measured value and the least it should be (None: only for comparison)."""

    name: str
    value: float
    bound: float | None
    unit: str  # "%" or ""

    @property
    def passed(self) -> bool:
        return self.bound is None or self.value >= self.bound

    def __str__(self) -> str:
        text = f"{self.name:<66} {self.value:6.1f}{self.unit or ' '}"
        if self.bound is None:
            return text
        return f"{text}  {'PASS' if self.passed else '—   '} (at least {self.bound:g}{self.unit})"


class DigitJudge:
    """Recognises digits; trained on the real training images of `data`.

    Raises:
        UserError: the data has no labels or no held-out images.
    """

    def __init__(self, data: ImageData) -> None:
        if data.train.labels is None or not len(data.held_out):
            raise UserError("the evaluation needs labelled images, some of them held out")
        self._classifier = SVC(C=10.0, gamma="scale")
        self._classifier.fit(_features(data.train.batch(slice(None))), data.train.labels.numpy())

    def recognised(self, images: Tensor, labels: Tensor) -> float:
        """Percentage of images (N, C, H, W) in [-1, 1] that are recognised as their label (N,)."""
        found = torch.from_numpy(self._classifier.predict(_features(images.cpu())))
        return float((found == labels.cpu()).double().mean() * 100)


def evaluate_digits(
    vqvae: VQVAE, prior: Prior, data: ImageData, *, samples_per_class: int = 100, seed: int = 0
) -> list[Figure]:
    """Measure reconstructions, samples and the use of the codebook.

    Args:
        samples_per_class: samples drawn for each class, at temperature 1 and without truncation.
        seed: of the samples.
    """
    device = next(vqvae.parameters()).device
    judge = DigitJudge(data)
    real, labels = data.held_out.batch(slice(None)), data.held_out.labels
    assert labels is not None  # the judge has checked it
    reconstructions = vqvae.decode(encode(vqvae, data.held_out, device).to(device), data.size)
    asked = torch.arange(len(data.class_names)).repeat_interleave(samples_per_class)
    generator = torch.Generator(device).manual_seed(seed)
    samples = draw(vqvae, prior, data.size, len(asked), labels=asked, generator=generator)
    codes = encode(vqvae, data.train, device)
    size = vqvae.quantizer.codebook_size
    used = float(metrics.perplexity(torch.bincount(codes.flatten(), minlength=size)))
    return [
        Figure(
            f"real held-out digits recognised as their label (of {len(real)})",
            judge.recognised(real, labels),
            None,
            "%",
        ),
        Figure(
            f"their reconstructions recognised as their label (of {len(real)})",
            judge.recognised(reconstructions, labels),
            95,
            "%",
        ),
        Figure(
            f"samples recognised as the digit asked for (of {len(asked)})", judge.recognised(samples, asked), 80, "%"
        ),
        Figure(f"perplexity of the training images' codes (codebook of {size})", used, size / 4, ""),
    ]


def _features(images: Tensor) -> np.ndarray:
    """Pixels clipped to their range, (N, C*H*W)."""
    return images.detach().clamp(-1, 1).flatten(1).numpy()
