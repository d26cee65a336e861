"""The linear probe: learns from training images alone, knows no labels it was not given."""

import pytest
import torch

from vqkernels.training.comparison.probe import linear_probe
from vqkernels.training.images import ImageSet


def noise(count, seed, labels=True):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 1, 4, 4), generator=generator).to(torch.uint8)
    return ImageSet(pixels, torch.randint(4, (count,), generator=generator) if labels else None)


def flat(x):
    return x.flatten(1)


def test_labels_that_are_in_the_features_are_found():
    train, held_out = noise(400, 0), noise(200, 1)
    for images in (train, held_out):
        images.pixels[torch.arange(len(images)), 0, 0, images.labels] = 255
        images.pixels[:, 0, 0] = images.pixels[:, 0, 0].where(images.pixels[:, 0, 0] == 255, 0)
    assert linear_probe(flat, train, held_out) == 100.0


def test_labels_that_are_noise_are_not_found():
    """A probe that has seen the held-out images would find far more than a quarter of 40 labels in 16 features."""
    found = linear_probe(lambda x: torch.cat([flat(x), flat(x) ** 2, flat(x) ** 3], 1), noise(400, 0), noise(40, 1))
    assert found is not None and found < 42.5


def test_what_is_learned_comes_from_the_training_images():
    """With the training labels exchanged, every held-out label is missed."""
    train, held_out = noise(400, 0), noise(200, 1)
    for images in (train, held_out):
        images.pixels[:, 0, 0, 0] = ((images.labels % 2) * 255).to(torch.uint8)
    exchanged = ImageSet(train.pixels, 1 - train.labels % 2)
    assert linear_probe(flat, exchanged, ImageSet(held_out.pixels, held_out.labels % 2)) == 0.0


@pytest.mark.parametrize("which", ["train", "held_out"])
def test_without_labels_there_is_no_figure(which):
    sets = {"train": noise(20, 0), "held_out": noise(10, 1)} | {which: noise(20, 2, labels=False)}
    assert linear_probe(flat, **sets) is None
