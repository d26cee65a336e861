"""The arithmetic of the quality benchmark on cases that are counted by hand, and one tiny run from end to end."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")  # the environment of the Triton tests has none

from studies import prior_quality
from vqkernels.cli.demo import demo_config
from vqkernels.models import PixelCNN
from vqkernels.training.config import PriorConfig, RunConfig, VQVAEConfig
from vqkernels.training.data import ImageData
from vqkernels.training.images import ImageSet
from vqkernels.training.pictures import image_grid

SHADES = torch.tensor([0, 127, 255], dtype=torch.uint8)


class Blocks(nn.Module):
    """A VQ-VAE without error: every code is a 2x2 block of black, grey or white."""

    quantizer = SimpleNamespace(codebook_size=3)

    def encode(self, x):
        return (x[:, 0, ::2, ::2] + 1).round().long()

    def decode(self, codes, size):
        return (codes - 1.0)[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)

    def latent_size(self, size):
        return size[0] // 2, size[1] // 2


class Mistaken(nn.Module):
    """A prior that fills the grid with the class asked for, but with the next class in every fourth grid."""

    def __init__(self, label_dropout):
        super().__init__()
        self.label_dropout = label_dropout
        self.weight = nn.Parameter(torch.zeros(()))
        self.ways = []

    def sample(self, shape, *, labels, temperature, guidance, **options):
        self.ways.append((temperature, guidance))
        wrong = torch.arange(shape[0]) % 4 == 3
        return torch.where(wrong, (labels + 1) % 3, labels)[:, None, None].expand(shape).clone()

    def bits_per_code(self, codes, labels):
        assert torch.equal(codes[:, 0, 0], labels)
        return 0.25 + 0.5 * (labels == 2)


def shades(*counts):
    """Constant images 4x4, so many of each shade, whose class is the shade."""
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    return ImageSet(SHADES[labels][:, None, None, None].expand(-1, 1, 4, 4).contiguous(), labels)


@pytest.fixture
def data():
    return ImageData(shades(6, 3, 3), shades(2, 1, 1), ("black", "grey", "white"))


def test_unigram_bits_of_a_case_counted_by_hand():
    # one added to each: 4/7, 2/7, 1/7 of the codes 0, 1, 2
    expected = math.log2(7) - (2 + 1 + 0 + 2) / 4
    found = prior_quality.unigram_bits(torch.tensor([3, 1, 0]), torch.tensor([[[0, 1], [2, 0]]]))
    assert found == pytest.approx(expected, abs=1e-12)


def test_bits_are_the_mean_over_all_grids_whatever_the_chunks():
    torch.manual_seed(0)
    prior = PixelCNN(5, hidden_channels=4, num_layers=2, num_classes=3, head_channels=4).eval()
    count = prior_quality.CHUNK + 7
    codes, labels = torch.randint(5, (count, 2, 3)), torch.randint(3, (count,))
    expected = float(prior.bits_per_code(codes, labels).detach().double().mean())
    assert prior_quality.prior_bits(prior, codes, labels) == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        prior.head[-1].weight.zero_()
        prior.head[-1].bias.zero_()
    assert prior_quality.prior_bits(prior, codes, labels) == pytest.approx(math.log2(5), rel=1e-6)


@pytest.mark.parametrize("label_dropout", [0.0, 0.1])
def test_shares_and_margin_of_a_case_counted_by_hand(data, label_dropout):
    prior = Mistaken(label_dropout)
    found = prior_quality.measure(Blocks(), prior, data, judged=6, per_class=8, seed=0)
    assert prior.ways == [(1.0, 1.0), (0.9, 1.0)] + ([(1.0, 1.5)] if label_dropout else [])
    assert [(way["temperature"], way["guidance"]) for way in found["samples"]] == prior.ways
    assert [way["recognised"] for way in found["samples"]] == [75.0] * len(prior.ways)
    assert found["recognised"] == {"real_held_out": 100.0, "reconstructions": 100.0, "images": 4}
    assert found["images"] == {"train": 12, "held_out": 4, "judge": 6} and found["grid"] == [2, 2]
    # training codes: 24, 12, 12 of 48, one added to each; held-out codes: 1/2, 1/4, 1/4
    unigram = math.log2(51) - (2 * math.log2(25) + 2 * math.log2(13)) / 4
    assert found["unigram_bits_per_code"] == pytest.approx(unigram, abs=1e-12)
    assert found["held_out_entropy_bits"] == pytest.approx(1.5, abs=1e-12)
    assert found["bits_per_code"] == pytest.approx((3 * 0.25 + 0.75) / 4)
    assert found["training_bits_per_code"] == pytest.approx((9 * 0.25 + 3 * 0.75) / 12)
    assert found["margin_bits"] == pytest.approx(unigram - 0.375)
    assert found["codes_in_use"] == 3


def test_completions_keep_the_upper_half_behind_its_image(data):
    torch.manual_seed(0)
    prior = PixelCNN(3, hidden_channels=4, num_layers=2, num_classes=3, head_channels=4).eval()
    grid = prior_quality.completions(Blocks(), prior, data, 0)
    scale, columns = 12, prior_quality.COMPLETIONS + 1
    assert grid.shape == image_grid(torch.zeros(3 * columns, 1, 4, 4), columns).shape
    lower = set()
    for label in range(3):
        for column in range(columns):
            top, left = 2 + label * (4 * scale + 2), 2 + column * (4 * scale + 2)
            tile = grid[0, top : top + 4 * scale, left : left + 4 * scale]
            # 127 is not quite the 0 that the code decodes to
            assert (tile[: 2 * scale].int() - int(SHADES[label])).abs().max() <= 1
            if column:
                lower |= set(tile[2 * scale :].unique().tolist())
            else:
                assert (tile == SHADES[label]).all()
    assert len(lower) > 1


def test_seconds_come_from_the_rates_of_the_run(tmp_path):
    config = RunConfig(data="digits", vqvae=VQVAEConfig(batch_size=10), prior=PriorConfig(batch_size=20))
    lines = [
        {"stage": "vqvae", "step": 50, "images_per_second": 100.0},
        {"stage": "vqvae", "step": 60, "images_per_second": 10.0},
        {"stage": "vqvae", "step": 60, "held_out_perplexity": 3.0},
        {"stage": "prior", "step": 50, "images_per_second": 200.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prior_quality.training_seconds(tmp_path / "metrics.jsonl", config) == {"vqvae": 15, "prior": 5}


def test_images_are_spread_over_sorted_classes():
    assert prior_quality.spread(shades(4, 4, 4), 6).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(prior_quality.spread(shades(4, 4, 4), 12)) == 12


def test_the_digits_are_those_of_the_demo_and_the_record_names_no_place():
    assert prior_quality.configuration("digits", "None", 3) == demo_config(3)
    config = prior_quality.configuration("mnist", "/somewhere/mnist", 0)
    assert config.check().data == "/somewhere/mnist"
    assert "somewhere" not in json.dumps(prior_quality.settings(config))


@pytest.mark.slow
def test_runs_measures_again_and_keeps_other_records(tmp_path, monkeypatch, capsys):
    def tiny(data, images, seed):
        config = demo_config(seed)
        vqvae = dataclasses.replace(config.vqvae, hidden_channels=8, steps=3)
        prior = dataclasses.replace(config.prior, hidden_channels=8, num_layers=2, steps=3, label_dropout=0.1)
        return dataclasses.replace(config, vqvae=vqvae, prior=prior)

    monkeypatch.setattr(prior_quality, "configuration", tiny)
    out = tmp_path / "quality.json"
    out.write_text(json.dumps({"mnist": {"bits_per_code": 1.0}}))
    common = ["--data", "digits", "--out", str(out), "--run", str(tmp_path / "run"), "--samples-per-class", "3"]
    prior_quality.main([*common, "--pictures", str(tmp_path)])
    first = json.loads(out.read_text())
    assert list(first) == ["digits", "mnist"] and first["mnist"] == {"bits_per_code": 1.0}
    record = first["digits"]
    assert len(record["samples"]) == 3 and record["samples"][2]["guidance"] == 1.5
    assert record["grid"] == [4, 4] and record["images"]["held_out"] == 359
    assert record["margin_bits"] == pytest.approx(record["unigram_bits_per_code"] - record["bits_per_code"])
    assert str(tmp_path) not in out.read_text()
    for name in ("reconstructions", "samples", "completions"):
        assert (tmp_path / f"digits_{name}.png").stat().st_size > 1000
    assert "at least 85%" in capsys.readouterr().out
    prior_quality.main(common)
    again = json.loads(out.read_text())["digits"]
    same = ("bits_per_code", "recognised", "margin_bits", "training_seconds")
    assert [again[name] for name in same] == [record[name] for name in same]
    assert [way["recognised"] for way in again["samples"]] == [way["recognised"] for way in record["samples"]]


def test_a_data_set_without_its_images_is_refused(capsys):
    with pytest.raises(SystemExit):
        prior_quality.main(["--data", "mnist", "--out", "x.json"])
    assert "mnist and cifar need the folder of their images" in capsys.readouterr().err
