"""The others: what each computes for the same z and codebook, ready to be called.

A peer that is not installed says so. `--wheels DIR` installs the wheels of a folder into a temporary one, without their
dependencies and without a network.
"""

import functools
import importlib
import inspect
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Search = Callable[[Tensor, Tensor], Tensor]


def install(wheels: Path) -> str | None:
    """Make the wheels of a folder importable; returns why that failed, or None."""
    found = sorted(str(path) for path in wheels.glob("*.whl"))
    if not found:
        return f"there is no wheel in {wheels}"
    target = tempfile.mkdtemp(prefix="wheels-")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, *found]
    done = subprocess.run(command, capture_output=True, text=True)
    sys.path.append(target)
    return done.stderr[-300:] if done.returncode else None


def addmm_argmin(z: Tensor, codebook: Tensor) -> Tensor:
    """The usual search: half squared norms minus products for all pairs, then the smallest of each row."""
    return torch.addmm(codebook.square().sum(1) / 2, z, codebook.T, alpha=-1).argmin(1)


def cdist_argmin(z: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(z, codebook).argmin(1)


def searches(dry: bool) -> dict[str, Search]:
    """name -> nearest-code search; an absent peer raises when called."""
    backend = "eager" if dry else "inductor"
    return {
        "addmm+argmin, compiled": torch.compile(addmm_argmin, backend=backend, dynamic=False),
        "cdist+argmin, compiled": torch.compile(cdist_argmin, backend=backend, dynamic=False),
        "flash-kmeans": _flash_kmeans,
        "rectokens": _rectokens,
    }


def _flash_kmeans(z: Tensor, codebook: Tensor) -> Tensor:
    assign = importlib.import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
    norms = {"x_sq": z.float().square().sum(1)[None]} if "x_sq" in inspect.signature(assign).parameters else {}
    return assign(z[None], codebook[None], **norms)[0].long()


def _rectokens(z: Tensor, codebook: Tensor) -> Tensor:
    return _rectokens_search()(z, codebook)


@functools.cache
def _rectokens_search() -> Search:
    before = torch.get_float32_matmul_precision()
    try:
        return importlib.import_module("rectokens.ops.nn_quantize").nearest_neighbor_quantize
    finally:
        torch.set_float32_matmul_precision(before)  # its import lowers the precision of the whole process


def lucidrains(dim: int, codes: int, device: torch.device) -> Any:
    """The best-known layer, training by moving averages and straight-through gradients; raises where not installed."""
    layer = importlib.import_module("vector_quantize_pytorch").VectorQuantize
    return layer(dim=dim, codebook_size=codes, decay=0.99, rotation_trick=False).to(device)


def lucidrains_residual(dim: int, codes: int, depth: int, device: torch.device) -> Any:
    """Its residual layer, for inference; raises where not installed."""
    layer = importlib.import_module("vector_quantize_pytorch").ResidualVQ
    return layer(dim=dim, codebook_size=codes, num_quantizers=depth).to(device).eval()
