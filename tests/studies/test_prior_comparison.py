"""The comparison of the priors: equal parameters or nothing, equal batches and seconds, bits that are the models'."""

import argparse
import json
import math

import pytest
import torch

pytest.importorskip("tyro")

from studies import prior_comparison
from studies.prior_comparison import Codes, PriorTraining

GRIDS = {"train": 40, "validation": 12, "test": 12}


def codes() -> Codes:
    torch.manual_seed(0)
    parts = {name: (torch.randint(9, (n, 2, 3)), torch.arange(n) % 4) for name, n in GRIDS.items()}
    return Codes(parts, 9, 4)


def options(**changed) -> argparse.Namespace:
    given = {"channels": 16, "layers": 2, "head": 16, "batch": 8, "learning_rate": 1e-3, "seconds": 0.1}
    return argparse.Namespace(**given | changed)


@pytest.mark.slow
def test_a_quick_run_writes_figures_and_table(tmp_path, capsys, threads):
    prior_comparison.main(["--quick", "--threads", "1", "--out", str(tmp_path / "c.json")])
    result = json.loads((tmp_path / "c.json").read_text())
    assert result["images"] == {"train": 1258, "validation": 180, "test": 359} and result["grid"] == [4, 4]
    counts = result["parameters"]
    assert abs(counts["transformer"] - counts["pixelcnn"]) <= 0.03 * counts["pixelcnn"]
    for records in result["seeds"].values():
        assert [record["seed"] for record in records] == [0, 1]
        for record in records:
            assert record["seconds"] >= 0.1 and record["steps"] == record["curve"][-1]["steps"] > 0
            assert 0 < record["processor_seconds"] < 1.5 * record["seconds"]
            assert record["kept_at_step"] in [point["steps"] for point in record["curve"]]
            assert 0 < record["test_bits"] < 2 * math.log2(16)
            tried = record["validation_bits_by_dropout"]
            assert set(tried) == {"0.1", "0.3"} and tried[str(record["dropout"])] == min(tried.values())
    table = (tmp_path / "c.md").read_text()
    assert f"| parameters | {counts['pixelcnn']:,} | {counts['transformer']:,} |" in table
    assert table in capsys.readouterr().out
    assert result["options"]["data"] == "digits" and str(tmp_path) not in (tmp_path / "c.json").read_text()


def test_parameters_too_far_apart_train_nothing(monkeypatch):
    monkeypatch.setattr(prior_comparison, "HEADS", 64)
    with pytest.raises(SystemExit, match="no transformer has within 3% of [0-9]+ parameters: nothing is trained"):
        prior_comparison.equal_sizes(codes(), options())


def test_both_see_the_same_batches_and_keep_their_best_weights():
    given, made = codes(), options()
    sizes = prior_comparison.equal_sizes(given, made)
    contenders = [PriorTraining(name, given, made, sizes[name], 0.1, 3) for name in prior_comparison.NAMES]
    first, second = (contender.batches for contender in contenders)
    assert all(torch.equal(first.indices(step), second.indices(step)) for step in (0, 4, 11))
    for contender in contenders:
        for seconds in (0.05, 0.1):
            contender.train_until(seconds)
        contender.curve.append({"steps": 10**6, "seconds": 9.0, "bits": 99.0})  # worse weights at the end
        with torch.no_grad():
            for parameter in contender.model.parameters():
                parameter.mul_(3)
        record = contender.finish()
        assert record["kept_at_step"] < 10**6 and record["test_bits_of_the_last_weights"] != record["test_bits"]
        grids, labels = given.parts["test"]
        bits = contender.model.eval().bits_per_code(grids, labels).detach()
        assert record["test_bits"] == pytest.approx(float(bits.mean()))
        kept = min(point["bits"] for point in contender.curve)
        assert prior_comparison.held_out_bits(contender.model, given, "validation") == pytest.approx(kept)


def test_independent_bits_are_the_cross_entropy_with_the_frequencies():
    parts = {"train": (torch.tensor([[[0, 0, 1]]]), None), "test": (torch.tensor([[[0, 1, 1]]]), None)}
    expected = -(math.log2(3 / 5) + 2 * math.log2(2 / 5)) / 3  # each code counted once more
    assert Codes(parts, 2, None).independent_bits() == pytest.approx(expected)
