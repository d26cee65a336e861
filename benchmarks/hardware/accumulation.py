"""Tries to falsify the accumulation model of margin.py on this chip's tensor cores.

The model: a product of fp16 rows q, p of D' elements, summed by the tensor core, is within 1.25 · D' · 2^-23 · ‖q‖‖p‖
of the real one; the certificate grants twice that. The product kernel below slices D as the search does and stores what
the search only reduces; float64 says what it should be. A ratio above 1 falsifies the model, above 2 the certificate.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.hardware.setting import Setting
from vqkernels.backends.triton import configs
from vqkernels.backends.triton.launch import FUSED_ROUNDING

BLOCK = 64


@triton.jit
def product_kernel(q, p, out, DIM: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    """out [BM, BM] = q [BM, DIM] · p [BM, DIM]ᵀ, one block per program pair."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    code = tl.program_id(1) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    product = tl.zeros((BM, BM), tl.float32)
    for start in range(0, DIM, BD):
        a = tl.load(q + row[:, None] * DIM + start + d[None, :])
        b = tl.load(p + code[:, None] * DIM + start + d[None, :])
        product = tl.dot(a, tl.trans(b), product)
    tl.store(out + row[:, None] * (tl.num_programs(1) * BM) + code[None, :], product)


def _normal(n: int, d: int) -> Tensor:
    return torch.randn(n, d)


def _positive(n: int, d: int) -> Tensor:
    """Sums that only grow: every truncation falls the same way."""
    return torch.rand(n, d) + 0.5


def _wide(n: int, d: int) -> Tensor:
    """Magnitudes over ten binary orders: alignment cuts most of the small ones off."""
    return torch.randn(n, d) * torch.exp2(-10 * torch.rand(n, d))


def _one_large(n: int, d: int) -> Tensor:
    """One element that sets the alignment, and many just above what it cuts off."""
    x = torch.full((n, d), 2.0**-6) * (1 + torch.rand(n, d) * 2.0**-9)
    x[:, 0] = 1.0
    return x


def _cancelling(n: int, d: int) -> Tensor:
    """Large partial sums that cancel."""
    x = torch.randn(n, d).abs()
    x[:, 1::2] *= -1
    return x


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": _normal,
    "positive": _positive,
    "wide": _wide,
    "one large": _one_large,
    "cancelling": _cancelling,
}


def accumulation(setting: Setting) -> Iterator[dict[str, Any]]:
    """The largest error over the model's bound, by length and kind of data."""
    size = setting.size(4096, BLOCK)
    for dim in setting.size((16, 32, 64, 128, 256, 512, 1024), (16, 128)):
        padded = configs.padded_dim(dim)
        ratios = {}
        for name, make in KINDS.items():
            torch.manual_seed(dim)
            q, p = (make(size, padded).to(setting.device, torch.float16) for _ in range(2))
            if name == "cancelling":
                p = p.abs()
            out = torch.empty(size, size, dtype=torch.float32, device=setting.device)
            product_kernel[(size // BLOCK, size // BLOCK)](
                q, p, out, DIM=padded, BD=configs.slice_dim(padded), BM=BLOCK, **FUSED_ROUNDING
            )
            wide, codes = q.double(), p.double()
            bound = 1.25 * padded * 2.0**-23 * wide.norm(dim=1)[:, None] * codes.norm(dim=1)[None, :]
            ratios[name] = float(((out.double() - wide @ codes.T).abs() / bound).max())
        worst = max(ratios.values())
        yield {
            "what": "accumulation error over the model's bound",
            "D": padded,
            "products": size * size,
            "ratios": {name: round(ratio, 5) for name, ratio in ratios.items()},
            "model": "holds" if worst <= 1 else "FALSIFIED",
            "certificate": "holds" if worst <= 2 else "FALSIFIED",
        }
