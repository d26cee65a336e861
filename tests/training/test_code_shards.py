"""Codes on disk: a million grids there and back, who writes what, and the sentence for each kind of damage."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from vqkernels.models import VQVAE
from vqkernels.training.code_shards import CodesDirectory, CodesIndex, fingerprint
from vqkernels.training.errors import UserError

CONTAINERS = ("npy", "parquet")


def index(**changed) -> CodesIndex:
    plain = CodesIndex(
        model="m",
        run="r",
        data="digits",
        split="all",
        images=10,
        shape=(1, 8, 8),
        codebook_size=16,
        codes=(2, 3),
        class_names=("a", "b"),
        labelled=True,
        shard_images=4,
        container="npy",
    )
    return dataclasses.replace(plain, **changed)


def grids(like: CodesIndex, shard: int):
    first, end = like.bounds(shard)
    generator = torch.Generator().manual_seed(shard)
    codes = torch.randint(like.codebook_size, (end - first, *like.codes), generator=generator)
    return codes, torch.arange(first, end) % 2 if like.labelled else None


def fill(directory: CodesDirectory):
    for shard in directory.missing():
        directory.write(shard, *grids(directory.index, shard))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("size", [16, 1 << 16, (1 << 16) + 1])
def test_what_is_read_is_what_was_written(tmp_path, container, labelled, size):
    written = CodesDirectory(tmp_path / "codes", index(container=container, labelled=labelled, codebook_size=size))
    fill(written)
    assert written.missing() == []
    read = CodesDirectory(tmp_path / "codes")
    assert read.index == written.index
    for shard in range(3):
        codes, labels = grids(read.index, shard)
        found = read.read(shard)
        assert torch.equal(found.codes, codes)
        assert (found.labels is None and labels is None) or torch.equal(found.labels, labels)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_million_grids_there_and_back(tmp_path, container):
    whole = index(images=1_000_000, shard_images=1 << 18, codes=(2, 2), container=container, labelled=False)
    directory = CodesDirectory(tmp_path / "codes", whole)
    fill(directory)
    read = CodesDirectory(tmp_path / "codes")
    assert sum(len(read.read(shard).codes) for shard in range(read.index.shards)) == 1_000_000
    assert all(torch.equal(read.read(shard).codes, grids(whole, shard)[0]) for shard in range(read.index.shards))


def test_parquet_is_what_others_read(tmp_path):
    import pyarrow.parquet

    fill(CodesDirectory(tmp_path / "codes", index(container="parquet")))
    table = pyarrow.parquet.read_table(tmp_path / "codes" / "codes-000001.parquet")
    assert table.column_names == ["codes", "label"]
    assert table.column("codes").to_pylist() == grids(index(), 1)[0].flatten(1).tolist()
    assert table.column("label").to_pylist() == [0, 1, 0, 1]


def test_a_shard_is_there_when_it_is_whole(tmp_path):
    """The codes come last; what a killed process left behind is removed by the one that writes the shard again."""
    directory = CodesDirectory(tmp_path / "codes", index())
    leftover = tmp_path / "codes" / ".codes-000001.npy.1.tmp"
    leftover.write_bytes(b"half")
    np.save(tmp_path / "codes" / "labels-000001.npy", np.zeros(4, np.int64))
    assert directory.missing() == [0, 1, 2]
    fill(directory)
    assert not leftover.exists()
    assert torch.equal(directory.read(1).labels, grids(index(), 1)[1])


def test_another_model_or_other_images_are_refused(tmp_path):
    CodesDirectory(tmp_path / "codes", index())
    with pytest.raises(UserError, match="was begun with another model and images; choose a new directory"):
        CodesDirectory(tmp_path / "codes", index(model="n", images=11))


def test_a_directory_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no codes: there is no index.json"):
        CodesDirectory(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no codes"):
        CodesDirectory(tmp_path, index())
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json is no index of codes"):
        CodesDirectory(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"format": "vqkernels-codes-9"}))
    with pytest.raises(UserError, match="was written by another version of vqkernels"):
        CodesDirectory(tmp_path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_damage_is_one_sentence(tmp_path, container):
    directory = CodesDirectory(tmp_path / "codes", index(container=container))
    fill(directory)
    file = tmp_path / "codes" / f"codes-000001.{container}"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged and cannot be read"):
        directory.read(1)
    file.write_bytes((tmp_path / "codes" / f"codes-000002.{container}").read_bytes())  # two images instead of four
    with pytest.raises(UserError, match=r"is not what index\.json says; delete it and encode again"):
        directory.read(1)
    file.unlink()
    with pytest.raises(UserError, match="is incomplete: codes-000001"):
        directory.read(1)


def test_a_code_that_the_codebook_has_not_is_refused(tmp_path):
    directory = CodesDirectory(tmp_path / "codes", index())
    fill(directory)
    directory.write(0, torch.full((4, 2, 3), 16), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match=r"is not what index\.json says"):
        directory.read(0)


def test_a_model_is_the_same_in_any_memory_format():
    model = VQVAE(3, hidden_channels=8, code_dim=4, codebook_size=8)
    before = fingerprint(model)
    assert fingerprint(model.to(memory_format=torch.channels_last)) == before
    model.encoder[0].weight.data[0, 0, 0, 0] += 1
    assert fingerprint(model) != before


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_flipped_bit_is_noticed(tmp_path, container):
    directory = CodesDirectory(tmp_path / "codes", index(container=container))
    fill(directory)
    for file in sorted(directory.path.glob(f"*-000001.{container}")):
        whole = file.read_bytes()
        for byte in range(0, len(whole) - 9, 7):
            flipped = bytearray(whole)
            flipped[byte] ^= 1 << byte % 8
            file.write_bytes(flipped)
            try:
                found = directory.read(1)
            except UserError as error:
                assert "delete it and encode again" in str(error)
            else:  # where it holds nothing, as in the name of the program that wrote it
                assert container == "parquet"
                codes, labels = grids(directory.index, 1)
                assert torch.equal(found.codes, codes) and torch.equal(found.labels, labels)
        file.write_bytes(whole)


def test_arrays_of_others_need_no_checksum(tmp_path):
    directory = CodesDirectory(tmp_path / "codes", index(labelled=False))
    fill(directory)
    file = directory.path / "codes-000001.npy"
    codes = np.load(file)
    np.save(file, 15 - codes)
    assert torch.equal(directory.read(1).codes, 15 - torch.from_numpy(codes.astype(np.int64)))
