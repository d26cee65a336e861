"""What is measured: shapes by regime, the data behind them, and the smaller set of `--quick`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqkernels.ops.nearest import nearest_code
from vqkernels.ops.statistics import codebook_statistics

CODEBOOKS = ("gaussian", "clustered", "k-means")


@dataclass(frozen=True)
class Case:
    """One row of the report.

    `kind` is "search", "training", "residual" (in eval), "residual training", "entropy" or "vqvae". For "vqvae" the
    images give the number of rows. The residual kinds have several `levels`.
    """

    kind: str
    rows: int
    codebook_size: int
    dim: int
    codebook: str = "gaussian"
    levels: int = 1

    @property
    def label(self) -> str:
        tail = "" if self.codebook == "gaussian" else f" {self.codebook}"
        tail = f" Q={self.levels}{tail}" if self.levels > 1 else tail
        return f"N={self.rows} K={self.codebook_size} D={self.dim}{tail}"

    @property
    def operations(self) -> float:
        """Float operations of the N x K products of all levels: 2 N K D Q. Every GFLOP/s here is this over the time."""
        return 2.0 * self.rows * self.codebook_size * self.dim * self.levels

    def data(self) -> tuple[Tensor, Tensor]:
        """Rows `(N, D)` and codes `(K, D)`, or `(Q, K, D)` with levels; float32, the same in every run."""
        torch.manual_seed(self.rows + self.codebook_size + self.dim)
        if self.levels > 1:
            scales = 0.9 ** torch.arange(self.levels)  # later levels are smaller
            return torch.randn(self.rows, self.dim), scales[:, None, None] * torch.randn(
                self.levels, self.codebook_size, self.dim
            )
        codes = torch.randn(self.codebook_size, self.dim)
        if self.codebook == "clustered":  # every row lies near its code, as in a trained model
            return codes[torch.randint(len(codes), (self.rows,))] + 0.3 * torch.randn(self.rows, self.dim), codes
        z = torch.randn(self.rows, self.dim)
        if self.codebook == "k-means":  # codes fitted to the rows, starting from rows
            codes = z[torch.randperm(self.rows)[: self.codebook_size]].clone()
            for _ in range(3):
                counts, sums = codebook_statistics(z, nearest_code(z, codes), self.codebook_size)
                codes = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], codes).float()
        return z, codes


_SEARCH = (
    (16384, 8192, 256),  # large K and D: the matrix product decides
    (8192, 16384, 256),
    (4096, 65536, 64),  # huge codebook, far larger than any cache
    (16384, 8192, 32),  # image tokenizers
    (32768, 1024, 64),  # audio codecs
    (65536, 512, 64),  # the paper's VQ-VAE
    (65536, 1024, 8),  # small D: the epilogue decides
    (65536, 512, 8),
    (65536, 256, 4),
    (4096, 1024, 64),  # small calls: overhead decides
    (1024, 512, 64),
)
_SHAPED = ((32768, 1024, 64), (16384, 8192, 32))
_TRAINING = ((32768, 1024, 64), (8192, 8192, 64), (4096, 1024, 64))
_RESIDUAL = ((16384, 1024, 128), (4096, 1024, 8))  # an audio codec's eight levels; and with DAC's eight channels
_LEVELS = 8
_ENTROPY = ((8192, 16384, 32),)

IMAGES, SIDE, HIDDEN, CODE_DIM = 32, 32, 128, 64  # of the VQ-VAE step: 32 images of 32 x 32, 8 x 8 codes each


def default_cases() -> list[Case]:
    """All cases of a full run, the slowest first, so that the fast ones can use the rest of the time."""
    vqvae_rows = IMAGES * (SIDE // 4) ** 2
    return [
        *(Case("search", *shape) for shape in _SEARCH),
        *(Case("search", *shape, kind) for shape in _SHAPED for kind in CODEBOOKS[1:]),
        *(Case("training", *shape) for shape in _TRAINING),
        *(Case(kind, *shape, levels=_LEVELS) for shape in _RESIDUAL for kind in ("residual", "residual training")),
        *(Case("entropy", *shape) for shape in _ENTROPY),
        *(Case("vqvae", vqvae_rows, size, CODE_DIM) for size in (8192, 512)),
    ]


def quick_cases() -> list[Case]:
    """Small cases, at least one of each kind: they show that it runs. None of them is a case of the full run."""
    return [
        Case("search", 1000, 512, 64),
        Case("search", 2048, 256, 8, "k-means"),
        Case("training", 1024, 256, 32),
        Case("residual", 512, 64, 16, levels=3),
        Case("residual training", 512, 64, 16, levels=3),
        Case("entropy", 512, 256, 16),
        Case("vqvae", 2 * (SIDE // 4) ** 2, 64, CODE_DIM),
    ]
