"""The perplexity benchmark on a handful of images: runs, resumes to the same record, and draws."""

import json

import pytest
import torch


@pytest.fixture
def images(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("tqdm")
    for split, number in (("train", 12), ("test", 6)):
        folder = tmp_path / "images" / split / "a"
        folder.mkdir(parents=True)
        for place in range(number):
            pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{place}.png")
    return tmp_path / "images"


@pytest.mark.slow
def test_runs_resumes_and_draws(images, tmp_path, monkeypatch, capsys):
    pytest.importorskip("vector_quantize_pytorch")
    pytest.importorskip("matplotlib")
    from studies import perplexity

    monkeypatch.setattr(perplexity, "BATCH", 8)
    common = [str(images), "--steps", "4", "--codebook-size", "16", "--every", "2"]
    perplexity.main([*common, "--out", str(tmp_path / "straight")])

    saved = torch.save

    def cut(state, path):
        saved(state, path)
        if state["step"] == 2 and "lucidrains" not in str(path):
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        perplexity.main([*common, "--out", str(tmp_path / "cut")])
    (tmp_path / "cut" / "vqkernels.part").rename(tmp_path / "cut" / "vqkernels.pt")
    monkeypatch.setattr(torch, "save", saved)
    perplexity.main([*common, "--out", str(tmp_path / "cut")])
    assert "vqkernels: goes on at step 2" in capsys.readouterr().out
    straight, resumed = (json.loads((tmp_path / run / "perplexity.json").read_text()) for run in ("straight", "cut"))
    assert [x["name"] for x in straight["contenders"]] == list(perplexity.CONTENDERS)
    for one, other in zip(straight["contenders"], resumed["contenders"], strict=True):
        assert one["curve"] == other["curve"] and one["curve"][-1]["step"] == 4
        assert 1 <= one["curve"][-1]["perplexity"] <= 16
    assert (tmp_path / "straight" / "perplexity.png").stat().st_size > 5000
    perplexity.main([*common, "--out", str(tmp_path / "straight")])
    assert capsys.readouterr().out.count("already done") == 3


def test_contenders_start_from_the_same_model():
    pytest.importorskip("vector_quantize_pytorch")
    pytest.importorskip("tqdm")
    from studies import perplexity

    models = [perplexity.build(name, 16, 0) for name in perplexity.CONTENDERS]
    for other in models[1:]:
        for part in ("encoder", "decoder"):
            a, b = getattr(models[0], part).state_dict(), getattr(other, part).state_dict()
            assert all(a[key].equal(b[key]) for key in a)
