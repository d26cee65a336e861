"""`vqkernels encode`: turns images into shards of codes. It can be resumed, and shared among processes by torchrun."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from vqkernels.training.code_shards import MAX_SHARDS, CodesDirectory, CodesIndex, Container, fingerprint
from vqkernels.training.data import open_source
from vqkernels.training.errors import UserError
from vqkernels.training.images import JoinedSource, Source, Splits
from vqkernels.training.model_building import load_vqvae, pick_device
from vqkernels.training.shard_encoding import encode_shards


@dataclass(frozen=True)
class EncodeArguments:
    """Encode images into codes. The same command continues after an interruption.

    'torchrun ... -m vqkernels -- encode ...' shares the work among its processes.
    """

    run: Path
    """The run directory of a trained VQ-VAE."""
    data: str
    """The images: any source of 'vqkernels train'. Their size may differ from that in training."""
    out: Path
    """The directory of codes: new, or one that this command began. Its index.json describes it."""
    split: Literal["all", "train", "test"] = "all"
    """all: the training images, then those of the test split, if the source has one."""
    shard_images: int = 4096
    """Images per file. About two files are in memory."""
    container: Container = "npy"
    """Format of a file; parquet needs pyarrow."""
    device: str = "auto"
    """auto: cuda if there is a GPU, else cpu."""


def run(arguments: Sequence[str]) -> int:
    """Parse the arguments and encode."""
    parsed = tyro.cli(EncodeArguments, prog="vqkernels encode", args=list(arguments))
    if parsed.shard_images < 1:
        raise UserError(f"--shard-images must be at least 1, but is {parsed.shard_images}")
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    vqvae, export = load_vqvae(parsed.run, _device(parsed.device))
    color = {1: "grey", 3: "rgb", 4: "rgba"}[export.images.channels]
    splits = open_source(parsed.data, color=color)  # type: ignore[arg-type]
    source = _chosen(splits, parsed.split, parsed.data)
    if -(-len(source) // parsed.shard_images) > MAX_SHARDS:
        raise UserError(
            f"{len(source)} images need more than {MAX_SHARDS} shards of {parsed.shard_images}: raise --shard-images"
        )
    directory = CodesDirectory(
        parsed.out,
        CodesIndex(
            model=fingerprint(vqvae),
            run=parsed.run.resolve().name,
            data=parsed.data,
            split=parsed.split,
            images=len(source),
            shape=source.shape,
            codebook_size=vqvae.quantizer.codebook_size,
            codes=vqvae.latent_size(source.shape[1:]),
            class_names=splits.class_names,
            labelled=source.labelled,
            shard_images=parsed.shard_images,
            container=parsed.container,
        ),
    )
    index = directory.index
    damaged = directory.damaged()
    if damaged and rank == 0:
        print(
            f"{len(damaged)} of {index.shards} shards in {parsed.out} are damaged and are encoded again",
            file=sys.stderr,
        )
    left = sum(end - first for first, end in map(index.bounds, {*directory.missing(), *damaged}))
    device = next(vqvae.parameters()).device
    with tqdm(total=left, desc="encoding", unit="image", leave=False, disable=None if rank == 0 else True) as bar:
        # The other ranks are about as far, so the bar counts their images too.
        count = encode_shards(
            vqvae, source, directory, device, rank=rank, ranks=ranks, encoded=lambda n: bar.update(n * ranks)
        )
    done = f"{index.images} images of {index.codes[0]}x{index.codes[1]} codes are in {parsed.out}"
    print(done if ranks == 1 else f"rank {rank}: {count} of {index.images} images encoded into {parsed.out}")
    return 0


def _device(name: str) -> torch.device:
    """Several processes on one machine use one GPU each."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


def _chosen(splits: Splits, split: str, data: str) -> Source:
    if split == "test" and splits.test is None:
        raise UserError(f"the data {data} has no test split")
    if split == "train" or splits.test is None:
        return splits.train
    return splits.test if split == "test" else JoinedSource([splits.train, splits.test], data)
