"""The table of faults: what breaks, the one sentence that says so, and that nothing is lost.

Kills are in test_kills.py, interrupted writes in test_checkpoint.py, damaged images in test_image_folder.py.
"""

import errno
import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vqkernels.cli.main import main
from vqkernels.training import array_files, stage_training, stages
from vqkernels.training.checkpoint import ImageFormat, RunDirectory, read_export
from vqkernels.training.code_shards import CodesDirectory
from vqkernels.training.config import PriorConfig, RunConfig, VQVAEConfig
from vqkernels.training.data import load_images, open_source
from vqkernels.training.errors import DiskFull, Diverged, UserError
from vqkernels.training.loop import train
from vqkernels.training.metrics import MetricsLog
from vqkernels.training.model_building import build_vqvae, load_models


def tiny(data: str = "digits", **vqvae) -> RunConfig:
    sizes = {"hidden_channels": 8, "code_dim": 4, "codebook_size": 8, "downsamplings": 1, "residual_blocks": 1}
    return RunConfig(
        data=data,
        log_every=1,
        checkpoint_every=3,
        picture_every=100,
        vqvae=VQVAEConfig(**{**sizes, "steps": 6, "batch_size": 64, "ema_decay": 0.9, **vqvae}),
        prior=PriorConfig(hidden_channels=8, num_layers=2, head_channels=8, steps=3, batch_size=64),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A whole run, which no test may change."""
    path = tmp_path_factory.mktemp("faults") / "run"
    train(tiny(), path)
    return path


def told(capsys, *arguments: object) -> tuple[int, str]:
    """Status and the one line of a failing command."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("vqkernels ")]
    assert len(lines) == 1 and captured.err.endswith(f"{lines[0]}\n"), captured.err
    return status, lines[0]


# --- a loss that is no longer finite ---------------------------------------------------------------------------------


def test_a_nan_loss_stops_and_its_batch_can_be_had_again(tmp_path):
    """The weights that met the batch are in the file too, so the loss comes back from it alone."""
    with pytest.raises(Diverged, match=r"the loss of the vqvae is \w+ at step 2; its batch is in .*, and there is no "):
        train(tiny(learning_rate=1e30, ema_decay=None), tmp_path / "run")
    file = tmp_path / "run" / "diverged_vqvae_000002.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    assert (header["stage"], header["step"], header["seed"]) == ("vqvae", "2", "0")
    config = RunConfig.from_toml(header["config"], "header")
    data = load_images("digits")
    assert torch.equal(tensors["pixels"], data.train.pixels[tensors["indices"]])
    assert torch.equal(tensors["labels"], data.train.labels[tensors["indices"]])
    model = build_vqvae(config, ImageFormat(1, 8, 8, ()), torch.device("cpu"))
    prefix = "model."
    model.load_state_dict({name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)})
    assert not model(tensors["pixels"].float() / 127.5 - 1)[2].total.isfinite()


@pytest.mark.parametrize("log_every", [1, 50])
def test_the_checkpoint_before_is_kept(tmp_path, monkeypatch, log_every):
    """The step is named at which it came, however rarely the loss is logged."""
    loss = stages.VQVAEStage.loss

    def poisoned(stage, indices):
        value, metrics = loss(stage, indices)
        poisoned.steps += 1
        return (value * float("nan") if poisoned.steps == 5 else value), metrics

    poisoned.steps = 0
    monkeypatch.setattr(stages.VQVAEStage, "loss", poisoned)
    options = ["--log-every", log_every, "--checkpoint-every", 3, "--vqvae.hidden-channels", 8, "--vqvae.steps", 9]
    status = main(["train", "--data", "digits", "--out", str(tmp_path), *map(str, options)])
    assert status == 1
    assert read_export(tmp_path).step == 3
    assert [x.name for x in tmp_path.glob("diverged*")] == ["diverged_vqvae_000005.safetensors"]
    monkeypatch.undo()
    assert main(["train", "--out", str(tmp_path), "--resume", "--stage", "vqvae"]) == 0
    assert read_export(tmp_path).step == 9


def test_the_exit_status_and_the_sentence_of_a_nan(tmp_path, capsys):
    sizes = ["--vqvae.hidden-channels", 8, "--vqvae.learning-rate", 1e30, "--vqvae.steps", 9]
    status, line = told(capsys, "train", "--data", "digits", "--out", tmp_path, *sizes)
    assert status == 1
    assert str(next(tmp_path.glob("diverged*"))) in line and "try a lower learning rate in a new run" in line


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path, monkeypatch):
    """The loss of the step is finite, its gradient is not: the next loss would be the first to tell."""
    loss = stages.VQVAEStage.loss

    def poisoned(stage, indices):
        value, metrics = loss(stage, indices)
        poisoned.steps += 1
        zero = next(stage.model.encoder.parameters()).sum() * 0
        return (value + zero.sqrt() if poisoned.steps == 6 else value), metrics

    poisoned.steps = 0
    monkeypatch.setattr(stages.VQVAEStage, "loss", poisoned)
    with pytest.raises(Diverged, match=r"a weight of the vqvae is nan at step 6; .* checkpoint \(vqvae step 3\)"):
        train(tiny(), tmp_path)
    assert read_export(tmp_path).step == 3
    assert all(x.isfinite().all() for x in read_export(tmp_path).tensors.values())


# --- a full disk -----------------------------------------------------------------------------------------------------


class Filled:
    """A file on a disk that takes so many bytes, until there is room."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = self.file.write(content[: self.room])
        self.room -= part
        return part

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_lines_of_metrics_wait_for_room(tmp_path, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "events", "vqvae", step=0, length=0)
    log._file = Filled(log._file, 70)
    for step in range(5):
        log.write(step, {"loss": step / 2})
    assert log.sync() == 70
    assert capsys.readouterr().err.count("cannot be written (No space left on device); training goes on") == 1
    log._file.room = 1 << 20
    log.write(5, {"loss": 2.5})
    length = log.sync()
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(6))
    assert length == (tmp_path / "metrics.jsonl").stat().st_size


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_run_whose_metrics_find_no_room_keeps_its_checkpoints(tmp_path, run):
    (tmp_path / "run").mkdir()
    shutil.copy(run / "config.toml", tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    assert train(tiny(), tmp_path / "run", resume=True).finished
    expected, found = read_export(run), read_export(tmp_path / "run")
    assert found.step == 3 and all(torch.equal(found.tensors[name], x) for name, x in expected.tensors.items())


def test_tensorboard_that_finds_no_room_ends_alone(tmp_path, monkeypatch, capsys):
    def full(*given, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    assert train(tiny(), tmp_path, stage="vqvae").finished
    assert read_export(tmp_path).step == 6
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 8  # 6 losses, 2 evaluations
    assert capsys.readouterr().err.count("TensorBoard's events of the vqvae cannot be written") == 1


def test_a_picture_that_finds_no_room_costs_no_checkpoint(tmp_path, monkeypatch, capsys):
    def full(grid, path):
        raise DiskFull(f"the disk is full: {path} cannot be written, and is as it was before")

    monkeypatch.setattr(stage_training, "save_png", full)
    assert train(tiny(), tmp_path, stage="vqvae").finished
    assert read_export(tmp_path).step == 6 and "training goes on" in capsys.readouterr().err


def test_a_checkpoint_that_finds_no_room_ends_the_run_which_resumes(tmp_path, monkeypatch, capsys, run):
    def full(state, file):
        if state["step"] == 6:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    save = torch.save
    monkeypatch.setattr(torch, "save", full)
    (tmp_path / "run.toml").write_text(tiny().to_toml())
    status, line = told(capsys, "train", "--config", tmp_path / "run.toml", "--out", tmp_path / "run")
    assert status == 1 and "the disk is full: " in line and "state.pt cannot be written, and is as it was" in line
    assert read_export(tmp_path / "run").step == 3
    monkeypatch.undo()
    assert train(tiny(), tmp_path / "run", resume=True).finished
    expected, found = read_export(run).tensors, read_export(tmp_path / "run").tensors
    assert all(torch.equal(found[name], x) for name, x in expected.items())


# --- checkpoints -----------------------------------------------------------------------------------------------------


def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_another_configuration_is_named_with_both_values(tmp_path, run, capsys):
    out = copied(run, tmp_path)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    changes = ["--seed", 4, "--vqvae.codebook-size", 16, "--vqvae.ema-decay", 0.5]
    status, line = told(capsys, "train", "--out", out, "--resume", *changes)
    assert status == 2
    for change in ("seed (0, now 4)", "vqvae.codebook_size (8, now 16)", "vqvae.ema_decay (0.9, now 0.5)"):
        assert change in line
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("content", ["pickle", "torch", "empty"])
def test_a_state_that_would_run_code_is_refused(tmp_path, run, capsys, content):
    out = copied(run, tmp_path)
    if content == "torch":
        torch.save({"format": "vqkernels-run-1", "step": Evil()}, out / "state.pt")
    else:
        (out / "state.pt").write_bytes(pickle.dumps(Evil()) if content == "pickle" else b"")
    status = main(["train", "--out", str(out), "--resume"])
    captured = capsys.readouterr()
    assert status == 2 and "state.pt is damaged and cannot be read" in captured.err and "must not" not in captured.out


def test_a_state_cut_or_changed_anywhere_is_refused_or_whole(tmp_path, run):
    out, draws = copied(run, tmp_path), np.random.default_rng(0)
    whole = (out / "state.pt").read_bytes()
    directory, refused = RunDirectory(out, resume=True), 0
    for number in range(60):
        at, content = int(draws.integers(len(whole))), bytearray(whole)
        if number % 2:
            content[at] ^= 1 << int(draws.integers(8))
        (out / "state.pt").write_bytes(content if number % 2 else content[:at])
        try:
            directory.load_state()
        except UserError:
            refused += 1
    assert refused > 55  # a bit of a header that nobody reads changes nothing


@pytest.mark.parametrize("fault", ["cut", "garbage", "promises more", "another header", "no header"])
def test_weights_that_are_damaged_are_one_sentence(tmp_path, run, capsys, fault):
    out = copied(run, tmp_path)
    file = out / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    if fault in ("cut", "garbage"):
        file.write_bytes(file.read_bytes()[:-100] if fault == "cut" else b"\xff" * 1000)
    elif fault == "promises more":  # a terabyte
        save_file(
            tensors,
            file,
            {**header, "config": header["config"].replace("codebook_size = 8", f"codebook_size = {1 << 38}")},
        )
    elif fault == "another header":
        save_file(tensors, file, {**header, "images": '{"channels": 1}'})
    else:
        save_file(tensors, file)
    status, line = told(capsys, "sample", "--run", out, "--out", tmp_path / "x.png")
    assert status == 2 and "model.safetensors" in line and not (tmp_path / "x.png").exists()
    if fault == "promises more":  # said before any memory was asked for
        assert "its tensors are not those of its configuration" in line


def test_a_deep_model_of_few_tensors_is_refused(tmp_path, run):
    out = copied(run, tmp_path)
    with safe_open(out / "model.safetensors", framework="pt") as opened:
        header = opened.metadata()
    config = header["config"].replace("num_layers = 2", "num_layers = 1000000000")
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors", {**header, "config": config})
    with pytest.raises(UserError, match="its configuration has 1000000000 layers"):
        load_models(out, torch.device("cpu"))


# --- codes -----------------------------------------------------------------------------------------------------------


def encode(run: Path, out: Path, container: str) -> int:
    options = ["--data", "digits", "--shard-images", "700", "--container", container]
    return main(["encode", "--run", str(run), "--out", str(out), *options])


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def garbage(file: Path) -> None:
    file.write_bytes(b"PAR1" + b"\x00" * 500 + b"PAR1")


def promise(file: Path) -> None:
    """A header of a terabyte, and nothing behind it."""
    with open(file, "wb") as opened:
        np.lib.format.write_array_header_1_0(opened, {"descr": "<u2", "fortran_order": False, "shape": (1 << 30, 4, 4)})


def objects(file: Path) -> None:
    np.save(file, np.array([Evil()], dtype=object), allow_pickle=True)


def rows(file: Path) -> None:
    """A whole file of fewer rows."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file)[:100], file)


@pytest.mark.parametrize(
    ("container", "damage"),
    [("npy", cut), ("npy", garbage), ("npy", promise), ("npy", objects)]
    + [("parquet", cut), ("parquet", garbage), ("parquet", rows)],
)
def test_a_damaged_shard_is_named_and_encoded_again(tmp_path, run, capsys, container, damage):
    codes = tmp_path / "codes"
    assert encode(run, codes, container) == 0
    whole = [CodesDirectory(codes).read(shard).codes for shard in range(3)]
    damage(codes / f"codes-000001.{container}")
    capsys.readouterr()
    status, line = told(capsys, "decode", "--run", run, "--codes", codes, "--out", tmp_path / "x.npy")
    assert status == 2 and f"codes-000001.{container} is" in line and "delete it and encode again" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes"]
    assert encode(run, codes, container) == 0
    captured = capsys.readouterr()
    assert "1 of 3 shards in" in captured.err and "are damaged and are encoded again" in captured.err
    assert all(torch.equal(CodesDirectory(codes).read(shard).codes, x) for shard, x in enumerate(whole))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("images", "many", "images must be a whole number from 1"),
        ("images", -3, "images must be a whole number from 1"),
        ("shard_images", 0, "shard_images must be a whole number from 1"),
        ("shape", [1, 8], "shape must be 3 sizes"),
        ("codes", [4, "x"], "codes must be 2 sizes"),
        ("codes", [5, 4], "does not fit the model"),
        ("class_names", [1, 2], "class_names must be strings"),
        ("labelled", 1, "labelled must be true or false"),
        ("container", "exe", "container must be npy or parquet"),
        ("model", "0" * 32, "are of another model"),
        ("images", 1796, "codes-000002.npy is not what index.json says"),
        ("codebook_size", 2, "is not what index.json says"),
        ("images", 1 << 39, "shard_images must be so large that 1048576 shards do"),
        ("images", 1 << 20, "1495 of 1498 shards are missing"),
    ],
)
def test_an_edited_index_is_one_sentence(tmp_path, run, capsys, name, value, sentence):
    codes = tmp_path / "codes"
    assert encode(run, codes, "npy") == 0
    table = json.loads((codes / "index.json").read_text())
    (codes / "index.json").write_text(json.dumps({**table, name: value}))
    capsys.readouterr()
    status, line = told(capsys, "decode", "--run", run, "--codes", codes, "--out", tmp_path / "x.npy")
    assert status == 2 and sentence in line
    assert not (tmp_path / "x.npy").exists()


def test_class_names_of_an_index_stay_in_the_folder(tmp_path, run):
    codes = tmp_path / "codes"
    np.savez(tmp_path / "d.npz", images=np.zeros((5, 8, 8), np.uint8), labels=np.arange(5))
    assert main(["encode", "--run", str(run), "--out", str(codes), "--data", str(tmp_path / "d.npz")]) == 0
    table = json.loads((codes / "index.json").read_text())
    table["class_names"] = ["../../out", "..", "/abs", "a/b", ""]
    (codes / "index.json").write_text(json.dumps(table))
    assert main(["decode", "--run", str(run), "--codes", str(codes), "--out", str(tmp_path / "images")]) == 0
    assert len(list((tmp_path / "images").glob("*/*.png"))) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"codes", "d.npz", "images"}


# --- files from strangers: nothing larger than it says, nothing larger than is allowed -------------------------------


def test_archives_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "zeros.npz", images=np.zeros((64, 64, 64), np.uint8), more=np.zeros(1 << 20))
    assert len(open_source(str(tmp_path / "zeros.npz")).train) == 64
    monkeypatch.setattr(array_files, "MAX_UNZIPPED", 1 << 17)
    with pytest.raises(UserError, match="would unpack to more than 131072 bytes"):
        open_source(str(tmp_path / "zeros.npz"))


def test_an_archive_whose_array_promises_more_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("images.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 8, 8)})
    with pytest.raises(UserError, match=r"x\.npz cannot be read as a NumPy file: images should have \d+ bytes, but"):
        open_source(str(tmp_path / "x.npz"))


def test_an_array_file_that_promises_more_is_refused(tmp_path):
    promise(tmp_path / "x.npy")
    with pytest.raises(UserError, match=r"x\.npy cannot be read as a NumPy file"):
        open_source(str(tmp_path / "x.npy"))


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path):
    Image.new("1", (9000, 8000)).save(tmp_path / "bomb.png")  # a few kilobytes
    with pytest.raises(UserError, match=r"bomb\.png cannot be read: its 9000x8000 pixels are more than the 67108864"):
        load_images(str(tmp_path), color="grey")


def test_one_huge_image_among_small_ones_is_not_decoded(tmp_path, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    Image.new("1", (8000, 8000)).save(tmp_path / "b.png")
    monkeypatch.setattr(
        Image.Image, "convert", lambda image, mode: pytest.fail("it was decoded") if image.width > 8 else image
    )
    with pytest.raises(UserError, match=r"a\.png is 8x8, but .*b\.png is 8000x8000"):
        load_images(str(tmp_path), color="grey")


def test_exif_data_that_is_nonsense_is_one_sentence(tmp_path):
    entries = (0x0112, 3, 1, b"\6\0\0\0"), (0x0100, 2, 1, b"x\0\0\0")  # to be turned; a width that is a text
    tags = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4)
    Image.new("L", (6, 4)).save(tmp_path / "x.jpg", exif=exif)
    with pytest.raises(UserError, match=r"the image .*x\.jpg cannot be read: required argument is not an integer"):
        load_images(str(tmp_path))


def test_no_format_that_runs_programs_is_read(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with pytest.raises(UserError, match=r"x\.png cannot be read: it is none of BMP, GIF, JPEG"):
        load_images(str(tmp_path), color="grey")


class Large:
    """Pickled as an array of a terabyte, without its bytes."""

    def __reduce__(self):
        from numpy._core.multiarray import _reconstruct

        return _reconstruct, (np.ndarray, (1 << 40,), b"b")


def test_a_pickle_makes_no_array_larger_than_itself(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Large(), b"labels": [0]}, protocol=2))
    with pytest.raises(UserError, match="it asks for an array of shape .* without its bytes"):
        open_source(str(tmp_path))
