"""The whole comparison on synthetic images: what it leaves behind, and how it goes on after an interruption."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from training.comparison.conftest import synthetic, tiny_settings

from vqkernels.training.comparison.contenders import CONTINUOUS, EMA, GRADIENT, Interrupted
from vqkernels.training.comparison.run import compare, data_name
from vqkernels.training.comparison.settings import settings_for
from vqkernels.training.data import ImageData
from vqkernels.training.errors import UserError
from vqkernels.training.images import ImageSet
from vqkernels.training.model_building import load_models, load_vqvae


def test_the_results_are_on_the_disk(compared):
    out, found, _ = compared
    table = json.loads((out / "results.json").read_text())
    assert table == json.loads(json.dumps(found.to_json()))
    assert [x["name"] for x in table["figures"]] == [GRADIENT, EMA, CONTINUOUS]
    assert table["settings"]["run"]["data"] == "bars.npz"
    assert all(x["seconds"] > 0 for x in table["figures"]) and table["collapse"]["seconds"] > 0


def test_curves_are_the_logged_bounds(compared):
    out, found, _ = compared
    for name, folder, stage in ((GRADIENT, "vq_vae_gradient", "vqvae"), (CONTINUOUS, "vae", "vae")):
        lines = [json.loads(x) for x in (out / "runs" / folder / "metrics.jsonl").read_text().splitlines()]
        own = [x for x in lines if x["stage"] == stage and "held_out_bits_per_dim" in x]
        assert found.curves[name] == [(x["step"], x["held_out_bits_per_dim"]) for x in own]
        assert [x["step"] for x in own] == [6, 12]
    uniform = next(x for x in found.figures if x.name == GRADIENT).likelihoods.bound
    assert found.curves[GRADIENT][-1][1] == pytest.approx(uniform, rel=1e-5)


def test_the_models_never_see_a_label(compared):
    out = compared[0]
    assert sorted(np.load(out / "images.npz")) == ["x_test", "x_train"]
    _, prior, export = load_models(out / "runs" / "vq_vae_ema", torch.device("cpu"))
    assert prior.num_classes is None and export.images.class_names == ()


def test_a_vaes_run_is_not_taken_for_a_vqvaes(compared):
    with pytest.raises(UserError, match="holds no VQ-VAE, but the weights of another model at stage 'vae'"):
        load_vqvae(compared[0] / "runs" / "vae", torch.device("cpu"))


def without_time(table):
    table = json.loads(json.dumps(table))
    for figures in (*table["figures"], table["collapse"]):
        del figures["seconds"]
    return table


def test_an_interrupted_comparison_ends_in_the_same_figures(compared, data, settings, tmp_path):
    times = 0
    while times < 60:
        steps = itertools.count()
        try:
            found, pictures = compare(settings, data, tmp_path / "out", should_stop=lambda s=steps: next(s) >= 9)
            break
        except Interrupted:
            times += 1
    assert times >= 5
    assert without_time(found.to_json()) == without_time(compared[1].to_json())
    for name, images in compared[2].samples.items():
        assert torch.equal(images, pictures.samples[name])


def test_a_finished_comparison_is_measured_again_and_not_trained_again(compared, data, settings):
    out, found, _ = compared
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("state.pt")}
    again, _ = compare(settings, data, out)
    assert again == found
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 6


def test_another_comparison_in_the_same_folder_is_refused(compared, data, settings, tmp_path):
    with pytest.raises(UserError, match="holds a comparison with other settings"):
        compare(dataclasses.replace(settings, evaluated=29), data, compared[0])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no comparison"):
        compare(settings, data, tmp_path)
    with pytest.raises(UserError, match="is a file, not a folder"):
        compare(settings, data, tmp_path / "notes.txt")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["notes.txt"]


def test_other_images_in_the_folder_of_an_interrupted_comparison_are_refused(data, settings, tmp_path):
    with pytest.raises(Interrupted):
        compare(settings, data, tmp_path / "out", should_stop=lambda: True)
    other = dataclasses.replace(data, train=synthetic(seed=2))
    with pytest.raises(UserError, match="holds a comparison of other images; give the same ones, or a new folder"):
        compare(settings, other, tmp_path / "out")


def test_the_name_of_a_source_has_no_folder_of_this_machine(tmp_path):
    assert data_name("digits") == "digits" and data_name(str(tmp_path / "cifar")) == "cifar"
    assert data_name("hf:ylecun/mnist") == "hf:ylecun/mnist"
    assert data_name("hf:ylecun/mnist:train[:10%]") == "hf:ylecun/mnist:train[:10%]"
    (tmp_path / "saved").mkdir()
    assert data_name(f"hf:{tmp_path / 'saved'}:test") == "hf:saved:test"


def test_too_few_held_out_images_are_refused(settings, tmp_path):
    images = synthetic(8)
    with pytest.raises(UserError, match="needs at least 2 held-out images"):
        compare(settings, ImageData(images, images.select(torch.arange(1)), ()), tmp_path / "out")
    with pytest.raises(UserError, match="evaluated must be at least 2, but is 1"):
        compare(dataclasses.replace(settings, evaluated=1), ImageData(images, images, ()), tmp_path / "out")


def test_colors_without_labels(tmp_path):
    """RGB images, some of them left out, no labels, no probe."""
    images, held_out = (ImageSet(synthetic(count, channels=3, seed=count).pixels, None) for count in (40, 20))
    settings = dataclasses.replace(tiny_settings(shape=(3, 8, 8)), train_images=24)
    found, pictures = compare(settings, ImageData(images, held_out, ()), tmp_path / "out")
    assert found.images["train"] == 24 and found.shape == (3, 8, 8)
    assert found.chance is None and {x.probe for x in found.figures} == {None}
    assert pictures.samples[CONTINUOUS].shape == (32, 3, 8, 8)
    assert len(np.load(tmp_path / "out" / "images.npz")["x_train"]) == 24


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_the_settings_of_every_size_are_in_range(shape):
    settings = settings_for("x", shape, seed=3).check()
    assert settings.run.seed == 3 and settings.run.vqvae.likelihood is not None
