"""The curves before and after a swap: one command that trains and draws, and what was committed holds what is said."""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def swap_curves():
    for package in ("tqdm", "PIL.Image", "vector_quantize_pytorch", "diffusers"):
        pytest.importorskip(package)
    from studies import swap_curves

    return swap_curves


@pytest.mark.slow
def test_trains_and_draws(swap_curves, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    (tmp_path / "images").mkdir()
    for place in range(6):
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{place}.png")
    out, plot = tmp_path / "curves.json", tmp_path / "curves.png"
    small = ["--steps", "3", "--batch", "2", "--codebook-size", "16"]
    swap_curves.main([str(tmp_path / "images"), "--out", str(out), "--plot", str(plot), *small])
    result = json.loads(out.read_text())
    assert [x["name"] for x in result["peers"]] == list(swap_curves.PEERS)
    for x in result["peers"]:
        assert len(x["theirs"]) == len(x["ours"]) == len(x["moved"]) == 3 and x["first_steps"] < 1e-4
    assert plot.stat().st_size > 5000


def test_a_difference_is_seen(swap_curves):
    theirs, ours = [2.0] * 30, [2.0] * 9 + [2.2] * 21
    found = swap_curves.record("diffusers", theirs, ours, [1.0] * 30)
    assert found["first_steps"] == 0 and found["end"] == pytest.approx(0.1) and found["end_of_moved"] == 0.5
    assert swap_curves.record("diffusers", [2.0] * 30, [3.0] * 30, theirs)["first_steps"] == 0.5


def test_the_committed_curves_coincide_and_end_together(swap_curves):
    """Within two percent, or no farther than twice the distance of the peer from itself, one weight moved by an ulp."""
    result = json.loads((ROOT / "studies" / "results" / "swap_curves.json").read_text())
    assert [x["name"] for x in result["peers"]] == list(swap_curves.PEERS) and result["steps"] == 200
    for x in result["peers"]:
        assert len(x["theirs"]) == len(x["ours"]) == len(x["moved"]) == 200
        assert swap_curves.record(x["name"], x["theirs"], x["ours"], x["moved"]) == x
        assert x["first_steps"] < 1e-4 and x["end"] < max(0.02, 2 * x["end_of_moved"])
    assert (ROOT / "docs" / "swap_curves.png").stat().st_size > 5000
