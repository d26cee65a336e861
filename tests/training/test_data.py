"""load_images: digits and NumPy files; scaling, splits and errors."""

import numpy as np
import pytest
import torch

from vqkernels.training.data import load_images, open_source
from vqkernels.training.errors import UserError


def test_digits_are_split_and_scaled():
    data = load_images("digits", held_out=0.2, seed=1)
    assert (len(data.train), len(data.held_out)) == (1438, 359)
    assert (data.channels, data.size) == (1, (8, 8))
    assert data.class_names == tuple("0123456789")
    everything = data.train.batch(slice(None))
    assert everything.dtype == torch.float32 and everything.min() == -1 and everything.max() == 1
    assert len(everything.unique()) == 17  # the scans have 17 levels, and none is lost


def test_the_split_is_keyed_by_the_seed_and_disjoint():
    first, again, other = (load_images("digits", held_out=0.2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.held_out.pixels, again.held_out.pixels) and first.fingerprint() == again.fingerprint()
    assert not torch.equal(first.held_out.pixels, other.held_out.pixels) and first.fingerprint() != other.fingerprint()
    both = torch.cat([first.train.pixels, first.held_out.pixels]).flatten(1).sum(1).sort().values
    assert torch.equal(both, load_images("digits", held_out=0).train.pixels.flatten(1).sum(1).sort().values)


def test_nothing_held_out():
    data = load_images("digits", held_out=0)
    assert (len(data.train), len(data.held_out)) == (1797, 0)


@pytest.mark.parametrize("shape", [(6, 5, 7), (6, 5, 7, 1), (6, 1, 5, 7), (6, 5, 7, 3), (6, 3, 5, 7), (6, 5, 7, 4)])
def test_arrays_of_every_layout(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    data = load_images(str(tmp_path / "x.npy"), held_out=0)
    assert data.size == (5, 7) and data.train.labels is None and data.class_names == ()
    channels_last = len(shape) == 4 and shape[3] in (1, 3, 4)
    expected = images.transpose(0, 3, 1, 2) if channels_last else images.reshape(6, -1, 5, 7)
    assert np.array_equal(data.train.pixels.numpy(), expected)


def test_boolean_and_floating_point_arrays(tmp_path):
    bits = np.random.default_rng(0).random((4, 3, 3)) < 0.5
    for name, images in (("bool", bits), ("float", bits.astype(np.float32))):
        np.save(tmp_path / f"{name}.npy", images)
        pixels = load_images(str(tmp_path / f"{name}.npy"), held_out=0).train.pixels
        assert np.array_equal(pixels[:, 0].numpy(), bits * 255)


def test_npz_with_labels(tmp_path):
    np.savez(tmp_path / "d.npz", images=np.zeros((10, 4, 4), np.uint8), labels=np.arange(10) % 3)
    data = load_images(str(tmp_path / "d.npz"), held_out=0.2)
    assert data.class_names == ("0", "1", "2")
    assert (len(data.train), len(data.held_out)) == (8, 2) == (len(data.train.labels), len(data.held_out.labels))


def test_npz_with_a_test_split(tmp_path):
    arrays = {
        "x_train": np.zeros((5, 4, 4), np.uint8),
        "y_train": np.arange(5),
        "x_test": np.ones((2, 4, 4), np.uint8),
        "y_test": np.arange(2),
    }
    np.savez(tmp_path / "d.npz", **arrays)
    data = load_images(str(tmp_path / "d.npz"), held_out=0.5)
    assert (len(data.train), len(data.held_out)) == (5, 2) and data.held_out.pixels.eq(1).all()


@pytest.mark.parametrize(
    "arrays,sentence",
    [
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, r"has no array 'images' or 'x_train' \(it has: pictures\)"),
        ({"images": np.zeros((2, 4), np.uint8)}, r"images must be \(N, H, W\).* but has shape \(2, 4\)"),
        ({"images": np.zeros((2, 5, 5, 2), np.uint8)}, "images must be"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "images is empty"),
        ({"images": np.zeros((2, 4, 4), np.int32)}, "images must be uint8, bool or floating point, but is int32"),
        ({"images": np.full((2, 4, 4), 1.5)}, r"images is floating point and must lie in \[0, 1\]"),
        ({"images": np.full((2, 4, 4), np.nan)}, r"images is floating point and must lie in \[0, 1\]"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "labels must be 2 whole numbers"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, "labels must be 2 whole numbers"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 1 << 40])}, "labels must be 2 whole numbers"),
        ({"images": np.array([{}, {}], dtype=object)}, "cannot be read as a NumPy file"),
    ],
)
def test_mistakes_in_arrays_are_named(tmp_path, arrays, sentence):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(UserError, match=sentence):
        load_images(str(tmp_path / "d.npz"))


def test_mistakes_in_the_source_are_named(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(UserError, match=r"broken\.npz cannot be read as a NumPy file"):
        load_images(str(tmp_path / "broken.npz"))
    with pytest.raises(UserError, match=r"text\.txt is neither a folder nor"):
        load_images(str(tmp_path / "text.txt"))
    with pytest.raises(UserError, match="the data nowhere does not exist"):
        load_images("nowhere")
    with pytest.raises(UserError, match="digits is grey, not rgb"):
        load_images("digits", color="rgb")


def test_a_large_npy_file_is_mapped_and_read_piece_by_piece(tmp_path):
    """A sparse file of 4 GiB opens at once, and no more of it is read than is asked for."""
    file = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.uint8, shape=(1 << 20, 64, 64))
    file[1 << 19] = 7
    file.flush()
    source = open_source(str(tmp_path / "x.npy")).train
    assert len(source) == 1 << 20
    part = source.read((1 << 19) - 1, (1 << 19) + 1)
    assert part.pixels.shape == (2, 1, 64, 64)
    assert part.pixels[:, 0, 0, 0].tolist() == [0, 7]
