"""The figures of the demo: the judge, what a figure says, and a model too poor to pass."""

import dataclasses

import pytest
import torch

from vqkernels.models import VQVAE, PixelCNN
from vqkernels.training.data import load_images
from vqkernels.training.errors import UserError
from vqkernels.training.evaluation import DigitJudge, Figure, evaluate_digits
from vqkernels.training.images import ImageSet


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", held_out=0.2)


def test_the_judge_knows_real_digits_and_no_noise(digits):
    judge, labels = DigitJudge(digits), digits.held_out.labels
    assert judge.recognised(digits.held_out.batch(slice(None)), labels) > 97
    assert judge.recognised(torch.rand(500, 1, 8, 8) * 2 - 1, torch.arange(500) % 10) < 25
    assert judge.recognised(digits.held_out.batch(slice(None)), (labels + 1) % 10) < 3


def test_the_judge_needs_labels_and_held_out_images(digits):
    with pytest.raises(UserError, match="needs labelled images, some of them held out"):
        DigitJudge(load_images("digits", held_out=0))
    with pytest.raises(UserError, match="needs labelled images"):
        DigitJudge(dataclasses.replace(digits, train=ImageSet(digits.train.pixels, None)))


def test_untrained_models_miss_the_bounds(digits):
    torch.manual_seed(0)
    vqvae = VQVAE(1, hidden_channels=8, code_dim=4, codebook_size=8, downsamplings=1).eval()
    prior = PixelCNN(8, hidden_channels=8, num_layers=2, num_classes=10).eval()
    real, reconstructions, samples, codes = evaluate_digits(vqvae, prior, digits, samples_per_class=20)
    assert real.passed and real.value > 97
    assert not reconstructions.passed and not samples.passed
    assert samples.value < 30 and 1 <= codes.value <= 8
    again = evaluate_digits(vqvae, prior, digits, samples_per_class=20)
    assert [figure.value for figure in again] == [real.value, reconstructions.value, samples.value, codes.value]


def test_a_figure_says_whether_it_passes():
    assert str(Figure("samples", 81.0, 80, "%")).endswith(" 81.0%  PASS (at least 80%)")
    assert "PASS" not in str(Figure("samples", 79.0, 80, "%")) and "(at least 80%)" in str(Figure("x", 79.0, 80, "%"))
    assert str(Figure("real", 99.0, None, "%")).endswith("99.0%")
