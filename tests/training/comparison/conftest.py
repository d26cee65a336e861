"""A comparison that takes seconds: tiny models on synthetic 8x8 images of two classes, trained once for all tests."""

import dataclasses

import pytest
import torch

from vqkernels.training.comparison.run import compare
from vqkernels.training.comparison.settings import settings_for
from vqkernels.training.data import ImageData
from vqkernels.training.images import ImageSet


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def synthetic(count=80, channels=1, size=8, seed=0) -> ImageSet:
    """Bars: upright in class 0, lying in class 1, at a random place and of a random brightness."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(20, (count, channels, size, size), generator=generator).to(torch.uint8)
    labels = torch.arange(count) % 2
    for number in range(count):
        place = int(torch.randint(size - 1, (), generator=generator))
        bright = int(torch.randint(150, 255, (), generator=generator))
        part = pixels[number, :, :, place : place + 2] if labels[number] == 0 else pixels[number, :, place : place + 2]
        part.fill_(bright)
    return ImageSet(pixels, labels)


def tiny_settings(shape=(1, 8, 8), data="bars.npz", **collapse):
    settings = settings_for(data, shape)
    run = settings.run
    vqvae = dataclasses.replace(
        run.vqvae, hidden_channels=8, code_dim=4, codebook_size=8, residual_blocks=1, steps=12, batch_size=8
    )
    prior = dataclasses.replace(run.prior, hidden_channels=8, num_layers=2, head_channels=8, steps=6, batch_size=8)
    return dataclasses.replace(
        settings,
        run=dataclasses.replace(run, vqvae=vqvae, prior=prior, checkpoint_every=6, log_every=3, picture_every=12),
        evaluated=30,
        importance_samples=3,
        probed=60,
        collapse=dataclasses.replace(
            settings.collapse,
            **{
                "levels": 4,
                "features": 4,
                "hidden_channels": 8,
                "num_layers": 2,
                "head_channels": 8,
                "steps": 6,
                "batch_size": 8,
                "evaluated": 20,
                **collapse,
            },
        ),
    )


@pytest.fixture(scope="package")
def data() -> ImageData:
    return ImageData(synthetic(), synthetic(40, seed=1), ("upright", "lying"))


@pytest.fixture(scope="package")
def settings():
    return tiny_settings()


@pytest.fixture(scope="package")
def compared(data, settings, tmp_path_factory):
    """The folder, what was found, and the pictures."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    found, pictures = compare(settings, data, out)
    return out, found, pictures
