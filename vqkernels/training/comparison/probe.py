"""The linear probe: what a linear classifier reads of the labels in latents that were learned without them."""

import warnings
from collections.abc import Callable

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vqkernels.training.images import ImageSet
from vqkernels.training.stages import chunks

STRENGTH = 0.1  # inverse of the regularisation, the same for all
ITERATIONS = 300


def linear_probe(features: Callable[[Tensor], Tensor], train: ImageSet, held_out: ImageSet) -> float | None:
    """Per cent of held-out images whose label a logistic regression finds; None where there are no labels.

    It learns from the training images, whose means and deviations also scale the features.

    Args:
        features: of images (B, C, H, W) in [-1, 1], (B, F).
    """
    if train.labels is None or held_out.labels is None or len(train.labels.unique()) < 2:
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what more iterations bring is less than the noise
        probe.fit(_all(features, train), train.labels.numpy())
    return float(np.mean(probe.predict(_all(features, held_out)) == held_out.labels.numpy()) * 100)


def _all(features: Callable[[Tensor], Tensor], images: ImageSet) -> np.ndarray:
    parts = [features(images.batch(chunk)).cpu().numpy() for chunk in chunks(len(images))]
    return np.concatenate(parts).astype(np.float64)
