"""IDX files: MNIST's layout, zipped or not; the sentence for each kind of damage."""

import gzip
import struct

import numpy as np
import pytest
import torch

from vqkernels.training.data import load_images, open_source
from vqkernels.training.errors import UserError


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(path, array):
    path.write_bytes(gzip.compress(idx(array)) if path.suffix == ".gz" else idx(array))


def pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 5, 4), dtype=np.uint8)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("mark", ["-", "."])
def test_a_folder_as_mnist_comes(tmp_path, end, mark):
    for name, count in (("train", 7), ("t10k", 3)):
        write(tmp_path / f"{name}-images{mark}idx3-ubyte{end}", pixels(count))
        write(tmp_path / f"{name}-labels{mark}idx1-ubyte{end}", np.arange(count, dtype=np.uint8))
    data = load_images(str(tmp_path))
    assert data.class_names == tuple("0123456")
    assert torch.equal(data.train.pixels[:, 0], torch.from_numpy(pixels(7)))
    assert data.train.labels.tolist() == list(range(7))
    assert data.held_out.labels.tolist() == [0, 1, 2]


def test_one_file_without_labels(tmp_path):
    write(tmp_path / "my-images-idx3-ubyte", pixels(4))
    splits = open_source(str(tmp_path / "my-images-idx3-ubyte"))
    assert splits.class_names == () and splits.test is None
    assert torch.equal(splits.train.read(1, 3).pixels[:, 0], torch.from_numpy(pixels(4)[1:3]))


def test_damage_is_one_sentence(tmp_path):
    file = tmp_path / "train-images-idx3-ubyte"
    whole = idx(pixels(4))
    for content, sentence in (
        (b"", "is no IDX file of bytes with 3 axes"),
        (b"\0\0\x0d\x03" + whole[4:], "is no IDX file of bytes"),
        (whole[:-1], r"must have 96 bytes, but has 95"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**20, 2**20), "more than the"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            open_source(str(file))
    zipped = tmp_path / "train-images-idx3-ubyte.gz"
    for content, sentence in (
        (gzip.compress(whole[:-1]), "must unpack to 96 bytes, but has less"),
        (gzip.compress(whole + b"!"), "but has more"),
        (gzip.compress(whole)[:-9], "cannot be read"),
        (gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 2**16, 2**8, 2**9)), f"more than the {2**32} that are read"),
    ):
        zipped.write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            open_source(str(zipped))


def test_files_that_do_not_belong_together(tmp_path):
    write(tmp_path / "train-images-idx3-ubyte", pixels(4))
    write(tmp_path / "t10k-images-idx3-ubyte", pixels(4)[:, :4])
    with pytest.raises(UserError, match="differ in image size"):
        open_source(str(tmp_path))
    write(tmp_path / "other-images-idx3-ubyte", pixels(4))
    with pytest.raises(UserError, match="must hold the IDX files of one data set, but holds other-images"):
        open_source(str(tmp_path))
