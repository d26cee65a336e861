"""The benchmark of the prior: runs end to end on a tiny cell, times nothing after something was wrong."""

import json

import pytest
import torch


def test_a_quick_run_writes_figures_table_and_plot(tmp_path, capsys, threads):
    pytest.importorskip("matplotlib")
    from benchmarks import prior

    prior.main(["--quick", "--threads", "1", "--out", str(tmp_path / "prior.json")])
    result = json.loads((tmp_path / "prior.json").read_text())
    (cell,), (step,) = result["sampling"], result["training"]
    assert cell["times_plain"] == cell["seconds"]["plain"] / cell["seconds"]["cached"] > 0
    assert all(1 <= count <= 16 for count in cell["positions_timed"].values())
    assert cell["extrapolated"] == [name for name, count in cell["positions_timed"].items() if count < 16]
    assert step["parameters"]["masked"] > step["parameters"]["ours"]
    assert "| 8 | 4×4 | 2 |" in (tmp_path / "prior.md").read_text()
    assert (tmp_path / "prior.png").stat().st_size > 5000
    assert "× plain" in capsys.readouterr().out


def test_training_alone_can_be_measured(tmp_path, threads):
    from benchmarks import prior

    prior.main(["--quick", "--training-only", "--threads", "1", "--out", str(tmp_path / "training.json")])
    result = json.loads((tmp_path / "training.json").read_text())
    assert result["sampling"] == [] and result["training"][0]["times_masked"] > 0
    assert "times the masked model" in (tmp_path / "training.md").read_text()
    assert not (tmp_path / "training.png").exists()


def test_a_missed_target_is_said():
    from benchmarks import prior

    cell = {"batch": 16, "channels": 64, "side": 8, "times_plain": 20.0}
    assert prior.verdicts([cell], []) == [
        "- sampling 8×8, times the plain sampler: 20 (goal 30, floor 15): floor met, goal missed"
    ]


def test_nothing_is_timed_where_the_codes_differ(monkeypatch):
    from benchmarks import prior

    def sample(self, shape, *, cached, **rest):
        return torch.full(shape, int(cached))

    monkeypatch.setattr(prior.PixelCNN, "sample", sample)
    with pytest.raises(SystemExit, match="nothing is timed"):
        prior.sampling(8, 4, 2, 0.1)
