"""The table of swapped models: measured by one command, losing cells visible, docs/swap.md shows the committed run."""

import json
from pathlib import Path

import pytest
import torch
from pages import shown
from torch import nn

ROOT = Path(__file__).parents[2]


@pytest.fixture
def swapped_models():
    for package in ("vector_quantize_pytorch", "diffusers", "transformers"):
        pytest.importorskip(package)
    from studies import swapped_models

    return swapped_models


def tiny():
    from vector_quantize_pytorch import VectorQuantize

    model = nn.Sequential(nn.Linear(4, 8), VectorQuantize(dim=8, codebook_size=32))
    return model, torch.randn(2, 30, 4), lambda output: output[0].square().mean() + output[2]


@pytest.mark.slow
def test_one_command_measures_and_puts_the_table(swapped_models, tmp_path, monkeypatch):
    from vqkernels.bench.model_memory import Peaks

    monkeypatch.setattr(swapped_models, "MODELS", {"tiny": ("Tiny", "VectorQuantize", 32)})
    monkeypatch.setattr(swapped_models, "tiny", tiny, raising=False)
    monkeypatch.setattr(swapped_models.model_memory, "measure", lambda *_: Peaks((3.0, 5.0), (0.0768, 0.00768)))
    page, out = tmp_path / "page.md", tmp_path / "swap.json"
    page.write_text(f"before\n{swapped_models.MARKS[0]}\nold\n{swapped_models.MARKS[1]}\nafter\n")
    swapped_models.main(
        ["--models", "tiny", "--out", str(out), "--readme", str(page), "--quick", "--seconds", "0.1", "--threads", "1"]
    )
    (record,) = json.loads(out.read_text())["models"]
    assert (record["rows"], record["layers"], record["left"]) == (60, 1, [])
    assert (record["indices_differing"], record["indices"], record["step"]) == (0, 60, "training step")
    assert max(record["largest_difference"].values()) < 1e-5
    assert swapped_models.units(record) == pytest.approx((10.0, 1.0))
    text = page.read_text()
    assert text.startswith(f"before\n{swapped_models.MARKS[0]}\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| Tiny | 60, 32 | training step | 0 of 60 |" in text and "a step needs 2 MB more" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no line '<!-- swapped models -->'"):
        swapped_models.main(["--out", str(out), "--readme", str(page)])


def test_what_is_slower_is_said(swapped_models):
    slow = {"before": {"median": 1.0}, "after": {"median": 2.0}}
    record = {"quantizer_ms": slow, "whole_ms": slow, "quantizer_mb": None, "whole_mb": None}
    assert swapped_models.losses(record) == ["the quantizers are 2.00x slower", "a step is 2.00x slower"]


def test_the_page_shows_the_committed_run(swapped_models):
    result = json.loads((ROOT / "studies" / "results" / "swap.json").read_text())
    assert [x["name"] for x in result["models"]] == list(swapped_models.MODELS)
    assert shown(swapped_models.MARKS) == swapped_models.table(result)


def test_the_committed_run_keeps_the_promise(swapped_models):
    """A VQ-VAE with lucidrains' layer and 8,192 codes: a step at least twice as fast, 5 N x K matrices less."""
    models = {x["name"]: x for x in json.loads((ROOT / "studies" / "results" / "swap.json").read_text())["models"]}
    large = models["vqvae_8192"]
    before, after = swapped_models.units(large)
    assert swapped_models.gain(large, "whole_ms") >= 2 and before - after >= 5
    assert all(x["left"] == [] for x in models.values())
