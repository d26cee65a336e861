"""From images to codes and back, piece by piece.

Threads read the next pieces, in order, and write the last shard while this piece is encoded.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from vqkernels.models import VQVAE
from vqkernels.training.code_shards import CodesDirectory
from vqkernels.training.images import ImageSet, Source
from vqkernels.training.pictures import to_pixels

CHUNK = 256  # images in one forward pass; the chunks of a shard are always the same, so that its codes are
READERS = min(4, os.cpu_count() or 1)  # threads that decode images


@torch.no_grad()
def encode_shards(
    vqvae: VQVAE,
    source: Source,
    out: CodesDirectory,
    device: torch.device,
    *,
    rank: int = 0,
    ranks: int = 1,
    encoded: Callable[[int], object] = lambda count: None,
) -> int:
    """Writes missing and damaged shards, each by one of `ranks` processes; memory is that of two shards.

    Args:
        vqvae: in eval mode, on the device.
        encoded: called with the number of images of every forward pass.

    Returns:
        How many images were encoded here.
    """
    mine = [shard for shard in sorted({*out.missing(), *out.damaged()}) if shard % ranks == rank]
    pieces = [(shard, start) for shard in mine for start in range(*out.index.bounds(shard), CHUNK)]
    count, codes, labels = 0, [], []
    with ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for (shard, start), images in zip(pieces, _ahead(source, out, pieces), strict=True):
            codes.append(vqvae.encode(images.batch(slice(None), device)).cpu())
            if images.labels is not None:
                labels.append(images.labels)
            count += len(images)
            encoded(len(images))
            if start + len(images) == out.index.bounds(shard)[1]:
                if written is not None:
                    written.result()  # what went wrong with it ends the run here
                written = writer.submit(out.write, shard, torch.cat(codes), torch.cat(labels) if labels else None)
                codes, labels = [], []
        if written is not None:
            written.result()
    return count


@torch.no_grad()
def decode_shards(vqvae: VQVAE, codes: CodesDirectory, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images (n, C, H, W) uint8 and labels of all codes, in order and piece by piece."""
    for shard in range(codes.index.shards):
        grids, labels = codes.read(shard)
        for part in range(math.ceil(len(grids) / CHUNK)):
            chunk = slice(part * CHUNK, (part + 1) * CHUNK)
            images = vqvae.decode(grids[chunk].to(device), codes.index.shape[1:])
            yield to_pixels(images), None if labels is None else labels[chunk]


def _ahead(source: Source, out: CodesDirectory, pieces: list[tuple[int, int]]) -> Iterator[ImageSet]:
    """The images of every piece, in their order; some are read while the one before is in use."""

    def read(piece: tuple[int, int]) -> ImageSet:
        shard, start = piece
        return source.read(start, min(start + CHUNK, out.index.bounds(shard)[1]))

    with ThreadPoolExecutor(READERS) as readers:
        coming: deque[Future[ImageSet]] = deque()
        try:
            for number in range(len(pieces) + READERS):
                if number < len(pieces):
                    coming.append(readers.submit(read, pieces[number]))
                if number >= READERS:
                    yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()
