"""CIFAR-10 batches: binary and Python ones give the same images; a pickle that asks for more is refused."""

import pickle

import numpy as np
import pytest
import torch

from vqkernels.training.cifar_files import NAMES
from vqkernels.training.data import load_images, open_source
from vqkernels.training.errors import UserError


def batch(count, seed):
    draws = np.random.default_rng(seed)
    return draws.integers(0, 256, (count, 3072), dtype=np.uint8), draws.integers(0, 10, count)


def write_binary(folder, name, pixels, labels):
    (folder / f"{name}.bin").write_bytes(np.hstack([labels[:, None].astype(np.uint8), pixels]).tobytes())


def write_pickle(folder, name, pixels, labels):
    content = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"some"}
    (folder / name).write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [write_binary, write_pickle])
def test_batches_are_joined_in_order(tmp_path, write):
    batches = [batch(3, seed) for seed in range(3)]
    write(tmp_path, "data_batch_1", *batches[0])
    write(tmp_path, "data_batch_2", *batches[1])
    write(tmp_path, "test_batch", *batches[2])
    data = load_images(str(tmp_path))
    assert data.class_names == NAMES
    expected = np.concatenate([batches[0][0], batches[1][0]]).reshape(6, 3, 32, 32)
    assert torch.equal(data.train.pixels, torch.from_numpy(expected))
    assert data.train.labels.tolist() == [*batches[0][1], *batches[1][1]]
    assert data.held_out.labels.tolist() == batches[2][1].tolist()
    across = open_source(str(tmp_path)).train.read(2, 5)
    assert torch.equal(across.pixels, data.train.pixels[2:5])
    assert torch.equal(across.labels, data.train.labels[2:5])


class _Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_pickle_that_asks_for_more_is_refused(tmp_path, capsys):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": _Evil()}, protocol=2))
    with pytest.raises(UserError, match=r"cannot be read as a batch of CIFAR-10: it asks for __builtin__\.print"):
        open_source(str(tmp_path))
    assert capsys.readouterr().out == ""


def test_damage_is_one_sentence(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(b"\0" * 3072)
    with pytest.raises(UserError, match="has 3072 bytes and is no batch of CIFAR-10, whose images take 3073 each"):
        open_source(str(tmp_path))
    (tmp_path / "data_batch_1.bin").write_bytes(b"\x0b" * 3073)
    with pytest.raises(UserError, match="has labels up to 11 and is no batch of CIFAR-10"):
        open_source(str(tmp_path))
    (tmp_path / "data_batch_1.bin").unlink()
    (tmp_path / "data_batch_1").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="cannot be read as a batch of CIFAR-10"):
        open_source(str(tmp_path))
