"""The full model's benchmark: runs end to end, refuses to time what learns something else, its table in the docs."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from pages import shown

pytestmark = pytest.mark.usefixtures("threads")
ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "full_model.json"


@pytest.fixture
def full_model(monkeypatch):
    pytest.importorskip("tyro")
    pytest.importorskip("sklearn")
    from benchmarks import demo_pipeline, full_model

    monkeypatch.setattr(demo_pipeline, "PER_CLASS", 4)

    return full_model


@pytest.fixture
def pipeline(full_model):
    from benchmarks import demo_pipeline

    return demo_pipeline


def tiny(pipeline):
    from vqkernels.cli.demo import demo_config

    return pipeline.shortened(demo_config(), 12, 8, 2)


def test_one_command_measures_and_puts_the_table(full_model, tmp_path):
    page, out = tmp_path / "page.md", tmp_path / "full_model.json"
    page.write_text(f"before\n{full_model.MARKS[0]}\nold\n{full_model.MARKS[1]}\nafter\n")
    full_model.main(["--quick", "--threads", "1", "--seconds", "0.1", "--out", str(out), "--readme", str(page)])
    result = json.loads(out.read_text())
    assert [row["what"] for row in result["parts"]] == ["VQ-VAE step, K=64", "prior step", "sampling"]
    for row in result["parts"]:
        medians = {name: x["median"] for name, x in row["seconds"].items()}
        assert row["times usual"] == {name: medians["usual"] / x for name, x in medians.items()}
    runs = result["demo"]["runs"]
    assert set(runs) == {"usual", full_model.DEFAULT, full_model.MIXED}
    for run in runs.values():
        assert sum(part["wall"] for part in run["parts"].values()) == pytest.approx(run["seconds"]["wall"])
        assert run["curves"]["vqvae"]["step"] == [2, 4, 6, 8, 10, 12] and len(run["curves"]["prior"]["loss"]) == 4
    text = page.read_text()
    assert text.startswith(f"before\n{full_model.MARKS[0]}\n") and text.endswith("\nafter\n") and "old" not in text
    assert full_model.table(result) in text and "- demo, defaults: " in text
    assert out.with_suffix(".png").stat().st_size > 5000
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no line '<!-- full model -->'"):
        full_model.main(["--out", str(out), "--readme", str(page)])


def test_the_usual_pipeline_learns_what_ours_learns(pipeline):
    """Same weights, batches and schedule: in float32 the losses of all steps are the same up to rounding."""
    config = dataclasses.replace(tiny(pipeline), log_every=1)
    usual, ours = pipeline.usual_run(config), pipeline.our_run(config)
    first, second = (torch.tensor(run["curves"]["vqvae"]["loss"]) for run in (usual, ours))
    torch.testing.assert_close(second, first, rtol=1e-3, atol=0)
    first, second = (torch.tensor(run["curves"]["prior"]["loss"]) for run in (usual, ours))
    torch.testing.assert_close(second, first, rtol=0.1, atol=0)  # other draws of dropout
    for name, value in usual["quality"].items():
        assert ours["quality"][name] == pytest.approx(value, rel=0.05)


def test_fewer_steps_are_noticed(pipeline, monkeypatch):
    config = tiny(pipeline)
    runs = {"usual": pipeline.usual_run(dataclasses.replace(config, prior=dataclasses.replace(config.prior, steps=6)))}
    runs["defaults"] = pipeline.our_run(config)
    with pytest.raises(SystemExit, match="took other steps than the usual one"):
        pipeline.check_runs(runs)
    train = pipeline._train

    def lazy(*arguments):
        losses = train(*arguments)
        del arguments[-1][-2:]  # two steps less
        return losses

    monkeypatch.setattr(pipeline, "_train", lazy)
    with pytest.raises(SystemExit, match="16 steps were done instead of 20"):
        pipeline.usual_run(config)


def test_a_worse_result_is_noticed(pipeline):
    run = {"curves": {s: {"step": [1], "loss": [1.0]} for s in ("vqvae", "prior")}}
    good = run | {"quality": dict.fromkeys(pipeline.QUALITY, 1.0)}
    worse = run | {"quality": dict.fromkeys(pipeline.QUALITY, 1.06)}
    pipeline.check_runs({"usual": good, "ours": good})
    with pytest.raises(SystemExit, match="has a worse held_out_reconstruction"):
        pipeline.check_runs({"usual": good, "ours": worse})
    other = good | {"curves": good["curves"] | {"vqvae": {"step": [1], "loss": [1.1]}}}
    with pytest.raises(SystemExit, match="do not begin alike"):
        pipeline.check_runs({"usual": good, "ours": other})


def test_time_to_a_loss_is_that_of_the_first_step_that_has_it(pipeline):
    def run(*losses):
        return {"curves": {"vqvae": {"seconds": [1.0, 2.0, 3.0], "loss": list(losses)}}}

    found = pipeline.times_to_loss({"usual": run(4.0, 2.0, 0.0), "ours": run(2.0, 2.0, 2.0)}, "vqvae")
    assert found["loss"] == pytest.approx(2.04)  # of the smoothed losses 4, 3, 2 and 2, 2, 2
    assert found["seconds"] == {"usual": 3.0, "ours": 1.0}


def test_nothing_is_timed_where_the_losses_differ(full_model, monkeypatch):
    options = full_model.argparse.Namespace(quick=True, threads=1, seconds=0.1)
    steps = full_model.vqvae_steps(16, 8, 2, {"defaults": full_model.FLAGS["defaults"]})
    steps["defaults"] = lambda step=steps["defaults"]: step() * 1.001
    monkeypatch.setattr(full_model, "interleave", lambda *_: pytest.fail("was timed"))
    with pytest.raises(SystemExit, match="the losses of 'defaults' are not the usual ones"):
        full_model.timed("VQ-VAE step", steps, options)


def test_a_missed_target_is_said(full_model):
    told = {"wall": 1.2}
    result = {
        "parts": [{"what": "VQ-VAE step, K=8192", "times usual": {"defaults": 2.3}}],
        "demo": {"times usual": {"defaults": told, "--amp bfloat16": {"wall": 2.0}}},
    }
    assert full_model.verdicts(result) == [
        "- VQ-VAE step, K=8192, defaults: 2.30x (goal 2.2): goal met",
        "- demo, defaults: 1.20x (goal 3.0, floor 1.5): floor missed",
        "- demo, --amp bfloat16: 2.00x (goal 3.0, floor 1.5): floor met, goal missed",
    ]


def test_the_page_shows_the_committed_run(full_model):
    if not RESULT.exists():
        pytest.skip("there is no committed run")
    assert shown(full_model.MARKS) == full_model.table(json.loads(RESULT.read_text())).strip()
