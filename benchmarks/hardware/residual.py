"""Residual quantization on the GPU: every index of every level against the fallback, both ways; then the clock.

The one launch that chains the levels and the searches level by level must agree with the fallback's search of each
residual, repeat themselves bit for bit, alone and as a CUDA graph, and give the same gradients. They are timed beside
the best-known layer and beside each other, which is what configs.chained_config decides by.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vqkernels as vq
from benchmarks.hardware.checks import Row, repeats_as_graph
from benchmarks.hardware.setting import Setting
from vqkernels import reference
from vqkernels.backends.triton import configs
from vqkernels.backends.triton.residual import residual_quantize, residual_quantize_backward
from vqkernels.bench.peers import unavailable
from vqkernels.bench.residual_peers import RESIDUAL

CELLS = [(1 << 16, 1024, 64, 8), (1 << 14, 1024, 128, 8), (1 << 14, 1024, 8, 32), (1 << 10, 1024, 64, 8)]
CHECKED = [(1 << 18, 1024, 64, 4), (1 << 16, 8192, 16, 4), (1 << 16, 1024, 256, 3)]
SAMPLE = 1024


@contextmanager
def by_level() -> Iterator[None]:
    """Search the levels one after the other, whatever D is."""
    before, configs.CHAINED_DIM = configs.CHAINED_DIM, 0
    try:
        yield
    finally:
        configs.CHAINED_DIM = before


def stack(setting: Setting, n: int, k: int, d: int, depth: int) -> tuple[Tensor, Tensor]:
    """Gaussian rows, and codebooks of about the size of what the levels before leave; some rows are codes."""
    torch.manual_seed(0)
    z = torch.randn(n, d, device=setting.device)
    scales = 0.7 ** torch.arange(depth, device=setting.device)
    codebooks = torch.randn(depth, k, d, device=setting.device) * scales[:, None, None]
    z[::7] = codebooks[0, torch.arange(len(z[::7]), device=setting.device) % k]
    return z, codebooks


def forward(z: Tensor, codebooks: Tensor, statistics: bool = False) -> tuple[Tensor, ...]:
    """The operator on z (N, D) and codebooks (Q, K, D); its results keep their two leading axes."""
    return residual_quantize(z[None, None], codebooks[None], None, "euclidean", "exact", statistics)


def wrong_rows(z: Tensor, codebooks: Tensor, indices: Tensor, search: Callable[[Tensor, Tensor], Tensor]) -> int:
    """Rows of which some level's index is not what `search` finds for its residual."""
    residual, wrong = z, torch.zeros(len(z), dtype=torch.bool, device=z.device)
    for level, codebook in enumerate(codebooks):
        wrong |= search(residual, codebook) != indices[:, level]
        residual = residual - codebook[indices[:, level]]
    return int(wrong.sum())


def residual_correctness(setting: Setting) -> Iterator[Row]:
    fallback = partial(vq.nearest_code, backend="eager")
    for cell in setting.size(CHECKED, [(20, 9, 8, 2)]):
        z, codebooks = stack(setting, *cell)
        results = {}
        for way in ("one launch", "by level"):
            if way == "one launch":
                first, again = forward(z, codebooks, True), forward(z, codebooks, True)
            else:
                with by_level():
                    first, again = forward(z, codebooks, True), forward(z, codebooks, True)
            wrong = wrong_rows(z, codebooks, first[1][0, 0], fallback)
            same = all(x.equal(y) for x, y in zip(first, again, strict=True))
            results[way] = first
            yield {
                "what": f"residual levels, {way}, {cell}",
                "ok": wrong == 0 and same,
                "wrong": wrong,
                "repeats": same,
            }
        alike = all(x.equal(y) for x, y in zip(*results.values(), strict=True))
        total = codebooks[0, first[1][0, 0, :, 0]]
        for level in range(1, len(codebooks)):
            total = total + codebooks[level, first[1][0, 0, :, level]]
        yield {"what": f"residual sums in level order, {cell}", "ok": alike and total.equal(first[0][0, 0])}
    z, codebooks = stack(setting, *setting.size((1000, 333, 64, 4), (20, 9, 6, 2)))
    losses = torch.ones(1, len(codebooks), device=setting.device)

    def step() -> list[Tensor]:
        quantized, indices, errors, counts, sums = forward(z, codebooks, True)
        grads = residual_quantize_backward(
            quantized, losses, losses, z[None, None], codebooks[None], indices, "rotation", True
        )
        return [quantized, indices, errors, counts, sums, *grads]

    same = repeats_as_graph(setting, step, lambda: z.copy_(z.flip(0)))
    yield {"what": "a CUDA graph repeats the bits of residual quantization", "ok": same}


def residual_times(setting: Setting) -> Iterator[Row]:
    for n, k, d, depth in setting.size(CELLS, [(20, 9, 8, 2)]):
        z, codebooks = stack(setting, n, k, d, depth)
        indices = forward(z, codebooks)[1]
        row: Row = {"what": "residual", "N": n, "K": k, "D": d, "levels": depth}
        row["wrong rows of a sample"] = wrong_rows(z[:SAMPLE], codebooks, indices[0, 0, :SAMPLE], reference.nearest)
        if row["wrong rows of a sample"]:
            yield row | {"problem": "wrong indices: nothing was timed"}
            continue
        yield row | {"times": setting.times(_contenders(setting, z, codebooks, indices))}


def _contenders(setting: Setting, z: Tensor, codebooks: Tensor, indices: Tensor) -> dict[str, Callable[[], Any]]:
    losses = torch.ones(1, len(codebooks), device=setting.device)

    def levels() -> tuple[Tensor, ...]:
        with by_level():
            return forward(z, codebooks)

    contenders: dict[str, Callable[[], Any]] = {
        "forward": partial(forward, z, codebooks),
        "forward, graph": setting.replayed(partial(forward, z, codebooks)),
        "forward, by level": levels,
        "forward, by level, graph": setting.replayed(levels),
        "forward with statistics": partial(forward, z, codebooks, True),
        "backward": partial(
            residual_quantize_backward, z[None, None], losses, losses, z[None, None], codebooks[None], indices,
            "straight_through", True,
        ),
    }  # fmt: skip
    peer = next(peer for peer in RESIDUAL["residual"] if peer.name == "lucidrains")
    if unavailable(peer.module, peer.package):
        return contenders
    return contenders | {"lucidrains forward, eval": peer.prepare(z, codebooks)}
