"""hf: sources, from the disk: saved data sets, Parquet files, folders; columns, splits, and mistakes."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vqkernels.cli.main import main
from vqkernels.training import hub_dataset
from vqkernels.training.data import load_images, open_source, resolved
from vqkernels.training.errors import UserError

datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The library's own cache, in the test's folder, and no attempt to reach the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def pictures(count: int, shape=(6, 5), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def rows(pixels: np.ndarray, **columns) -> "datasets.Dataset":
    """A data set of PNGs, with a column of labels unless others are given."""
    columns = columns or {"label": [number % len(CLASSES) for number in range(len(pixels))]}
    features = {"image": datasets.Image()}
    for name, values in columns.items():
        whole = isinstance(values[0], int)
        features[name] = datasets.ClassLabel(names=list(CLASSES)) if whole else datasets.Value("string")
    return datasets.Dataset.from_dict(
        {"image": [Image.fromarray(x) for x in pixels], **columns}, features=datasets.Features(features)
    )


def test_a_saved_data_set_with_a_test_split(tmp_path):
    train, test = pictures(7), pictures(4, seed=1)
    datasets.DatasetDict(train=rows(train), test=rows(test)).save_to_disk(tmp_path / "saved")
    data = load_images(f"hf:{tmp_path / 'saved'}")
    assert data.class_names == CLASSES and (data.channels, data.size) == (1, (6, 5))
    assert torch.equal(data.train.pixels[:, 0], torch.from_numpy(train))
    assert torch.equal(data.held_out.pixels[:, 0], torch.from_numpy(test))
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0] and data.held_out.labels.tolist() == [0, 1, 2, 0]
    part = open_source(f"hf:{tmp_path / 'saved'}").train.read(2, 5)
    assert torch.equal(part.pixels[:, 0], torch.from_numpy(train[2:5])) and part.labels.tolist() == [2, 0, 1]


def test_the_split_that_was_asked_for(tmp_path):
    train, test = pictures(7), pictures(4, seed=1)
    datasets.DatasetDict(train=rows(train), validation=rows(test)).save_to_disk(tmp_path / "saved")
    asked = open_source(f"hf:{tmp_path / 'saved'}:validation")
    assert asked.test is None and torch.equal(asked.train.read(0, 4).pixels[:, 0], torch.from_numpy(test))
    assert len(open_source(f"hf:{tmp_path / 'saved'}").test) == 4
    with pytest.raises(UserError, match="there is no split 'nonsense'"):
        open_source(f"hf:{tmp_path / 'saved'}:nonsense")


@pytest.mark.parametrize("name", ["validation", None])
def test_a_saved_split_is_not_taken_for_another(tmp_path, name):
    part = rows(pictures(7))
    datasets.Dataset(part.data, part.info, name and datasets.NamedSplit(name)).save_to_disk(tmp_path / "saved")
    for split in ("", f":{name or 'train'}"):
        assert len(open_source(f"hf:{tmp_path / 'saved'}{split}").train) == 7
    for split in ("test", "train[:3]"):
        with pytest.raises(UserError, match="there is no split"):
            open_source(f"hf:{tmp_path / 'saved'}:{split}")


def test_a_parquet_file_and_a_slice_of_it(tmp_path):
    pixels = pictures(9, (5, 6, 3))
    rows(pixels, label=[2] * 9).to_parquet(tmp_path / "x.parquet")
    whole = open_source(f"hf:{tmp_path / 'x.parquet'}")
    assert whole.train.shape == (3, 5, 6) and whole.class_names == CLASSES
    assert torch.equal(whole.train.read(0, 9).pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    part = open_source(f"hf:{tmp_path / 'x.parquet'}:train[2:5]", color="grey").train
    assert len(part) == 3 and part.shape == (1, 5, 6)
    with pytest.raises(UserError, match="cannot be opened: Unknown split"):
        open_source(f"hf:{tmp_path / 'x.parquet'}:nonsense")


def test_a_row_group_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    rows(pictures(9, (50, 60, 3))).to_parquet(tmp_path / "x.parquet")
    monkeypatch.setattr(hub_dataset, "MAX_ROW_GROUP", 1 << 16)
    with pytest.raises(UserError, match=r"x\.parquet cannot be opened: it has a row group of \d+ bytes, more than the"):
        open_source(f"hf:{tmp_path / 'x.parquet'}")


def test_a_folder_that_the_library_opens(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "folder" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (4, 3), number).save(tmp_path / "folder" / split / name / f"{number}.png")
    splits = open_source(f"hf:{tmp_path / 'folder'}")
    assert splits.class_names == ("cat", "dog") and (len(splits.train), len(splits.test)) == (6, 4)
    assert splits.train.labelled and splits.train.shape == (1, 3, 4)


def test_other_names_of_columns_and_no_labels(tmp_path):
    named = rows(pictures(3), fine=[2, 1, 0], coarse=[0, 0, 1], text=["a", "b", "c"]).rename_column("image", "img")
    named.save_to_disk(tmp_path / "named")
    assert open_source(f"hf:{tmp_path / 'named'}").train.read(0, 3).labels.tolist() == [2, 1, 0]
    rows(pictures(3), text=["a", "b", "c"]).save_to_disk(tmp_path / "bare")
    bare = open_source(f"hf:{tmp_path / 'bare'}")
    assert bare.class_names == () and not bare.train.labelled


def test_it_trains_and_resumes_from_elsewhere(tmp_path, monkeypatch, capsys):
    rows(pictures(20, (8, 8))).save_to_disk(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    tiny = ["--vqvae.hidden-channels", "8", "--vqvae.codebook-size", "8", "--vqvae.downsamplings", "1"]
    tiny += ["--vqvae.code-dim", "4", "--vqvae.steps", "1", "--vqvae.batch-size", "8", "--stage", "vqvae"]
    assert main(["train", "--data", "hf:saved:train", "--out", "run", *tiny]) == 0, capsys.readouterr().err
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert main(["train", "--out", "../run", "--resume", "--vqvae.steps", "2", "--stage", "vqvae"]) == 0
    assert resolved("hf:ylecun/mnist:test") == "hf:ylecun/mnist:test"


def broken(tmp_path, cells) -> str:
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(tmp_path / "broken")
    return f"hf:{tmp_path / 'broken'}"


def png(width: int, height: int) -> dict:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ([png(4, 4), {"bytes": png(4, 4)["bytes"][:40], "path": None}], "the image 1 of .* cannot be read"),
        ([png(4, 4), {"bytes": b"%!PS", "path": None}], "the image 1 of .* cannot be read: it is none of BMP, GIF, "),
        ([png(4, 4), None], "the image 1 of .* cannot be read: there is none"),
        ([png(4, 4), png(5, 4)], "the first one is 4x4, but 1 of .* is 5x4"),
        ([png(9000, 8000)], "its 9000x8000 pixels are more than the 67108864 that are read"),
    ],
)
def test_a_bad_image_is_named(tmp_path, cells, sentence):
    with pytest.raises(UserError, match=sentence):
        load_images(broken(tmp_path, cells), color="grey")


def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(UserError, match=r"has no column of images \(it has: text\)"):
        open_source(f"hf:{tmp_path / 'text'}")
    rows(pictures(2), label=[0, -1]).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(UserError, match=r"the column label of .* must hold whole numbers from 0 and below 100000"):
        open_source(f"hf:{tmp_path / 'unlabelled'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be opened"):
        open_source(f"hf:{tmp_path / 'empty'}")
    for source in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(UserError, match="must be hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"):
            open_source(source)

    def unreachable(*given, **named):
        raise ConnectionError("Couldn't reach 'ylecun/mnist' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="the hub cannot be reached for hf:ylecun/mnist, and it is not in the cache"):
        open_source("hf:ylecun/mnist")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["train", "--data", "hf:ylecun/mnist", "--out", str(tmp_path / "run")]) == 2
    assert "hf:ylecun/mnist needs the package datasets: pip install 'vqkernels[data]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("hf:a/b", ("a/b", None, None)),
        ("hf:a/b:test", ("a/b", None, "test")),
        ("hf:a/b:train[:10%]", ("a/b", None, "train[:10%]")),
        ("hf:a:plain:train[1:3]+test", ("a", "plain", "train[1:3]+test")),
    ],
)
def test_what_the_library_is_asked_for(monkeypatch, given, asked):
    seen = []

    def load(name, config=None, *, split=None):
        seen.append((name, config, split))
        return rows(pictures(2))

    monkeypatch.setattr(datasets, "load_dataset", load)
    open_source(given)
    assert seen == [asked]
