"""The report of a comparison: every number stands where it belongs, and is one that was computed."""

import dataclasses
import re

import pytest
import torch
from training.comparison.conftest import tiny_settings
from training.report.test_report import check_self_contained

from vqkernels.training.comparison.collapse import Collapse
from vqkernels.training.comparison.contenders import CONTINUOUS, EMA, GRADIENT
from vqkernels.training.comparison.measures import Figures, LatentUse, Likelihoods
from vqkernels.training.comparison.report import document, verdict
from vqkernels.training.comparison.run import Comparison, Pictures
from vqkernels.training.report import Paragraph, Table, to_html, write_markdown

FACTS = {"processor": "an abacus", "torch": "2.13.0"}
SIZES = {"encoder": 1001, "decoder": 2002, "quantizer": 303, "prior": 404}


def made_up(**changes) -> Comparison:
    """Figures none of which is like another."""
    figures = (
        Figures(
            GRADIENT,
            SIZES,
            Likelihoods(3.101, 1.102, 4.203, 0.904, 4.005),
            LatentUse(66.6, 31.7, 0.58, None, 64),
            0.0106,
            81.7,
            108.0,
        ),
        Figures(
            EMA,
            {**SIZES, "encoder": 1009},
            Likelihoods(3.211, 1.112, 4.323, 0.814, 4.025),
            LatentUse(67.6, 41.8, 0.69, None, 64),
            0.0216,
            82.8,
            209.0,
        ),
        Figures(
            CONTINUOUS,
            {"encoder": 1055, "decoder": 2002, "quantizer": 0, "prior": 0},
            Likelihoods(3.321, 0.532, 3.853, None, 3.814),
            LatentUse(23.5, None, None, 129, 256),
            0.0326,
            83.9,
            301.0,
        ),
    )
    collapse = Collapse(17, 64, 125.31, 124.21, 124.83, 0.14, 3, 257, 95.41, 151.52, 96.0, 47.3, 65, 77.0)
    return Comparison(
        **{
            "settings": tiny_settings(data="<b>some/place</b>/bars.npz"),
            "images": {"train": 81, "held_out": 42, "evaluated": 31, "probed": 63, "collapse_evaluated": 24},
            "shape": (1, 8, 8),
            "grid": (4, 4),
            "figures": figures,
            "collapse": collapse,
            "pixels_probe": 84.1,
            "chance": 52.3,
            "curves": {GRADIENT: [(6, 5.0), (12, 4.5)], EMA: [(6, 5.1), (12, 4.4)], CONTINUOUS: [(6, 4.9), (12, 4.1)]},
            **changes,
        }
    )


def pictures() -> Pictures:
    names = (GRADIENT, EMA, CONTINUOUS)
    image = torch.zeros(4, 1, 8, 8)
    return Pictures(image, dict.fromkeys(names, image), dict.fromkeys(names, image))


def tables(found=None):
    report = document(found or made_up(), pictures(), FACTS, "vqkernels compare")
    return [x for x in report.blocks if isinstance(x, Table)]


def rows(table):
    return {row[0]: row[1:] for row in table.rows}


def test_likelihoods_stand_in_the_rows_and_columns_of_their_names():
    table = tables()[0]
    assert table.header[1:] == (
        "pixels given latents",
        "latents: uniform prior, KL",
        "bound: uniform prior, ELBO",
        "codes, trained prior",
        "bound, trained prior",
        "importance-weighted, 3 samples",
        "squared error",
    )
    assert rows(table) == {
        GRADIENT: ("3.101", "1.102", "4.203", "0.904", "4.005", "–", "0.0106"),
        EMA: ("3.211", "1.112", "4.323", "0.814", "4.025", "–", "0.0216"),
        CONTINUOUS: ("3.321", "0.532", "3.853", "–", "–", "3.814", "0.0326"),
    }


def test_the_papers_figures_stand_beside_ours():
    table = tables()[1]
    assert table.header == ("bits per dimension", "paper, CIFAR-10", "here, bars.npz")
    assert rows(table) == {"VAE": ("4.51", "3.85"), "VQ-VAE": ("4.67", "4.00"), "VIMCO": ("5.14", "not trained")}
    report = document(made_up(), pictures(), FACTS, "vqkernels compare")
    text = " ".join(x.text for x in report.blocks if isinstance(x, Paragraph))
    assert "JPEG re-encodings" in text and "250,000 steps" in text


def test_collapse_in_bits_of_an_image():
    table = tables()[2]
    assert table.header[1:] == (
        "pixels given latents, bits an image",
        "latents: KL, uniform prior",
        "bound, bits per dimension",
        "own latents' gain over another image's",
        "gain over no latents",
        "in use",
    )
    assert rows(table) == {
        "without latents": ("125.31", "–", "1.958", "–", "–", "–"),
        "VAE": ("124.21", "0.14", "1.943", "0.62", "1.10", "3 of 257 units"),
        "VQ-VAE (EMA)": ("95.41", "96.00", "2.991", "56.11", "29.90", "perplexity 47.3 of 65"),
    }


@pytest.mark.parametrize(
    "changes,said",
    [
        ({}, ["0.14 bits an image and 3 of its 257 units", "has collapsed", "worth 56.1 bits", "they are used"]),
        ({"vae_kl": 12.0}, ["12.00 bits an image", "has not collapsed"]),
        ({"vqvae_shuffled": 95.5}, ["worth 0.1 bits", "they are not used"]),
    ],
)
def test_what_is_said_of_collapse_follows_from_the_numbers(changes, said):
    found = made_up(collapse=dataclasses.replace(made_up().collapse, **changes))
    report = document(found, pictures(), FACTS, "vqkernels compare")
    text = " ".join(x.text for x in report.blocks if isinstance(x, Paragraph))
    assert [part for part in said if part not in text] == []


def test_use_and_probe():
    assert rows(tables()[3]) == {
        GRADIENT: ("66.6", "–", "31.7 of 64", "58.0 %", "81.7 %"),
        EMA: ("67.6", "–", "41.8 of 64", "69.0 %", "82.8 %"),
        CONTINUOUS: ("23.5", "129 of 256", "–", "–", "83.9 %"),
        "pixels": ("–", "–", "–", "–", "84.1 %"),
    }
    assert "63 training images" in tables()[3].caption and "52.3 %" in tables()[3].caption


def test_without_labels_there_is_no_probe_and_no_chance():
    found = made_up(
        pixels_probe=None, chance=None, figures=tuple(dataclasses.replace(x, probe=None) for x in made_up().figures)
    )
    assert {row[-1] for row in tables(found)[3].rows} == {"–"}
    assert "Probe" not in tables(found)[3].caption


def test_parameters_and_seconds():
    assert rows(tables()[4]) == {
        GRADIENT: ("1,001", "2,002", "303", "404", "3,306", "108"),
        EMA: ("1,009", "2,002", "303", "404", "3,314", "209"),
        CONTINUOUS: ("1,055", "2,002", "0", "0", "3,057", "301"),
    }


@pytest.mark.parametrize("elbo,said", [(3.85, "0.15 more, within the 0.3"), (3.5, "0.50 more, not within the 0.3")])
def test_the_verdict_compares_the_trained_prior_with_the_bound(elbo, said):
    """Of the two VQ-VAEs the better one, 4.005; its uniform prior is named beside it."""
    vae = made_up().figures[2]
    vae = dataclasses.replace(vae, likelihoods=dataclasses.replace(vae.likelihoods, bound=elbo))
    found = made_up(figures=(*made_up().figures[:2], vae))
    assert said in verdict(found) and verdict(found).startswith(GRADIENT)
    assert f"uniform prior it is {4.203 - elbo:.2f} more" in verdict(found)


def test_the_settings_are_those_of_the_comparison():
    found = rows(tables()[5])
    assert found["training"] == ("12 steps of 8, Adam, 0.001, cosine",)
    assert found["latents"] == ("4×4 of 4 channels; 8 codes",)
    assert found["held-out images"] == ("42, of which 31 are measured",)
    assert rows(tables()[6]) == {name: (value,) for name, value in FACTS.items()}


def test_the_page_is_self_contained_and_names_no_folder():
    text = to_html(document(made_up(), pictures(), FACTS, "vqkernels compare --data 'a & b'"))
    check_self_contained(text)
    assert "some/place" not in text and "a &amp; b" in text


def test_a_real_comparison_is_reported_with_its_own_numbers(compared, tmp_path):
    out, found, drawn = compared
    report = document(found, drawn, FACTS, "vqkernels compare")
    check_self_contained(to_html(report))
    table = rows(next(x for x in report.blocks if isinstance(x, Table)))
    for figures in found.figures:
        likelihoods = figures.likelihoods
        assert table[figures.name][2] == f"{likelihoods.bound:.3f}"
        assert float(table[figures.name][0]) + float(table[figures.name][1]) == pytest.approx(
            likelihoods.bound, abs=2e-3
        )
    write_markdown(report, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert f"{found.figures[2].likelihoods.bound:.3f}" in text
    assert all((tmp_path / name).exists() for name in re.findall(r"\]\((\w+\.png)\)", text))
