"""How often `precision="fast"` names another code than the contract does, simulated on the CPU.

    TRITON_INTERPRET=1 python -m studies.fast_precision            print the table
    TRITON_INTERPRET=1 python -m studies.fast_precision --write    also write studies/results/fast_precision.json

"triton": the Triton backend's own packing kernels run in Triton's interpreter, so rows and codes are rounded to fp16 by
the very code that a GPU would run. The matrix product of the rounded operands is done here: once with float32 sums
("triton"), and for the first rows with a model of a tensor core that cuts every addend off below 24 bits of the largest
("truncating", sums over 16 channels at a time). Nothing here was measured on a GPU; what a GPU's own sums add is
of the size of the difference between these two columns.
"cpu": the C++ kernels' fast mode itself, on the machine at hand. "eager": the fallback's.

An index is wrong if it is not the one that `vqkernels.reference` prescribes (found by the exact mode of the C++
kernels, which the test suite holds to it). `excess`: the largest fraction by which the squared distance of a chosen
code exceeds that of the nearest.
"""

from __future__ import annotations

import argparse
import json
import os
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import vqkernels as vq
from vqkernels.backends.triton import configs, nearest

RESULT = Path(__file__).parent / "results" / "fast_precision.json"
ROWS, TRUNCATED_ROWS = 65536, 1024
CASES = ((512, 64), (1024, 64), (8192, 32), (1024, 256))  # (K, D)


def gaussian(rows: int, codes: int, dim: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows and codes alike: nothing is near anything, the hardest case of ordinary data."""
    return torch.randn(rows, dim, generator=g), torch.randn(codes, dim, generator=g)


def clustered(rows: int, codes: int, dim: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every row is a code and half a standard deviation of noise."""
    codebook = torch.randn(codes, dim, generator=g)
    return codebook[torch.randint(codes, (rows,), generator=g)] + 0.5 * torch.randn(rows, dim, generator=g), codebook


def k_means(rows: int, codes: int, dim: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Channels of standard deviation i^-1/2, codes after five rounds of k-means on half of the rows."""
    spread = torch.arange(1, dim + 1).float() ** -0.5
    z = torch.randn(rows, dim, generator=g) * spread
    seen = z[: rows // 2]
    codebook = seen[torch.randperm(len(seen), generator=g)[:codes]].clone()
    for _ in range(5):
        counts, sums = vq.codebook_statistics(seen, vq.nearest_code(seen, codebook), codes)
        codebook = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], codebook)
    return z, codebook


DATA: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "gaussian": gaussian,
    "clustered": clustered,
    "k-means": k_means,
}


def fp32_product(q: Tensor, p: Tensor) -> Tensor:
    """Exact products, float32 sums."""
    return q.float() @ p.float().T


def truncating_product(q: Tensor, p: Tensor, step: int = 16) -> Tensor:
    """A tensor core as margin.py models it: the products of a step and the running sum lose what lies 24 bits below the
    largest of them, and the sum is cut to float32."""
    left, right = q.double(), p.double()
    total = left.new_zeros(len(q), len(p))
    for start in range(0, q.shape[1], step):
        part = slice(start, start + step)
        terms = torch.cat([left[:, None, part] * right[None, :, part], total[:, :, None]], 2)
        unit = _unit(terms.abs().amax(2, keepdim=True))
        total = ((terms / unit).trunc() * unit).sum(2)
        unit = _unit(total.abs())
        total = (total / unit).trunc() * unit
    return total


def _unit(largest: Tensor) -> Tensor:
    return torch.exp2(torch.floor(torch.log2(torch.where(largest > 0, largest, 1.0))) - 23)


def candidate_pass(z: Tensor, codebook: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What the candidate pass of the Triton backend would choose: indices (N,)."""
    config = configs.SearchConfig(32, 64, 16, 4, 1, False)
    codes = nearest.pack_codes(z[None, None], None, codebook[None], "euclidean", config, certified=False)
    with unittest.mock.patch.object(configs, "PACK_ROWS", 1024):  # rows are packed each by itself: only faster here
        rows = nearest.pack_rows(z[None, None], None, codes, config)
    p, half = codes.packed[: len(codebook)], codes.half_norms[: len(codebook)]
    found = []
    block = max(1, (1 << 20) // len(codebook)) if product is fp32_product else 16
    for start in range(0, len(z), block):
        part = slice(start, min(start + block, len(z)))
        scaled = rows.beta[part, None].double() * product(rows.packed[part], p).double()  # exact: beta is a power of 2
        score = (half.double() - scaled).float()
        found.append((score == score.amin(1, keepdim=True)).int().argmax(1))  # the lowest of equals
    return torch.cat(found)


def judge(found: Tensor, expected: Tensor, z: Tensor, codebook: Tensor) -> dict[str, Any]:
    """How many indices are wrong, and by how much the worst."""
    wrong = (found != expected).nonzero()[:, 0]
    rows = z[wrong].double()
    nearest_one = (rows - codebook[expected[wrong]].double()).square().sum(1)
    excess = (rows - codebook[found[wrong]].double()).square().sum(1) / nearest_one - 1
    worst = float(excess.max()) if len(wrong) else 0.0
    return {"rows": len(z), "wrong": len(wrong), "rate": round(len(wrong) / len(z), 7), "excess": float(f"{worst:.1e}")}


def cell(data: str, codes: int, dim: int, rows: int, truncated_rows: int) -> dict[str, Any]:
    """One line of the table."""
    z, codebook = DATA[data](rows, codes, dim, torch.Generator().manual_seed(codes + dim))
    expected = vq.nearest_code(z, codebook)
    few = slice(0, truncated_rows)
    fast = {name: vq.nearest_code(z, codebook, precision="fast", backend=name) for name in ("cpu", "eager")}
    found = {
        "triton": candidate_pass(z, codebook, fp32_product),
        "truncating": candidate_pass(z[few], codebook, truncating_product),
        **fast,
    }
    line = {name: judge(index, expected[: len(index)], z[: len(index)], codebook) for name, index in found.items()}
    differ = int((found["triton"][few] != found["truncating"]).sum())
    return {"data": data, "codes": codes, "dim": dim, "sums that changed an index": differ, **line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("the packing kernels run in Triton's interpreter: set TRITON_INTERPRET=1")
    lines = []
    for codes, dim in CASES:
        for data in DATA:
            lines.append(cell(data, codes, dim, arguments.rows, TRUNCATED_ROWS))
            print(
                f"{data:10s} K={codes:<5d} D={dim:<4d}"
                + "".join(
                    f"  {name} {lines[-1][name]['rate']:.2e}" for name in ("triton", "truncating", "cpu", "eager")
                )
                + f"  excess <= {lines[-1]['triton']['excess']:.1e}",
                flush=True,
            )
    if arguments.write:
        told = {"torch": torch.__version__, "triton": triton.__version__, "vqkernels": vq.__version__}
        told["simulated"] = "triton and truncating, on a CPU; cpu and eager are the backends themselves"
        RESULT.write_text(json.dumps({**told, "cells": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
