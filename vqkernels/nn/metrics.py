"""How much of a codebook is in use: from the counts of one step, and over an epoch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import check_size
from .synchronisation import Ranks


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the codes' frequencies `(..., K)`: 1 if one code takes all rows, K if all share them."""
    total = counts.sum(-1, keepdim=True).clamp_min(1)
    frequency = counts.to(torch.float32) / total
    return torch.exp(torch.special.entr(frequency).sum(-1))


def usage(counts: Tensor) -> Tensor:
    """Fraction of codes with at least one row."""
    return (counts > 0).to(torch.float32).mean(-1)


def dead_codes(counts: Tensor) -> Tensor:
    """Number of codes without a row, int64."""
    return (counts == 0).sum(-1)


class Counted(nn.Module):
    """A layer that counts the rows of each code `(K,)`, or `(H, K)` for H codebooks, in every training step."""

    counts: Tensor

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of the last training step's code frequencies, in [1, K]; 0-d, or (H,) per codebook."""
        return perplexity(self.counts)

    @property
    def usage(self) -> Tensor:
        """Fraction of codes that the last training step used; 0-d, or (H,) per codebook."""
        return usage(self.counts)

    @property
    def dead_codes(self) -> Tensor:
        """Number of codes that the last training step did not use, int64; 0-d, or (H,) per codebook."""
        return dead_codes(self.counts)


class Usage(NamedTuple):
    """What `CodebookUsage.compute` gives: 0-d, or of the shape `codebooks`."""

    perplexity: Tensor  # exp of the entropy of the codes' frequencies, in [1, K]; 1 where no row counted
    usage: Tensor  # fraction of codes with at least one row
    dead_codes: Tensor  # number of codes without a row, int64


class CodebookUsage:
    """Perplexity and usage over many batches, in training or in eval mode, from the indices that a layer returns.

        used = CodebookUsage(layer.codebook_size)
        for z in batches:
            _, indices, _ = layer(z)
            used.update(indices)
        print(used.compute())

    Args:
        codebook_size: K.
        codebooks: sizes of the last axes of the indices that choose a codebook: `(Q,)` for the levels of a residual
            layer, `(G, Q)` with groups, `(H,)` where each head has its codebook; empty for one codebook.
        process_group: the ranks whose rows count, as in `VectorQuantizer`.
    """

    def __init__(self, codebook_size: int, codebooks: tuple[int, ...] = (), process_group: Any = None) -> None:
        for name, size in (("codebook_size", codebook_size), *(("codebooks", size) for size in codebooks)):
            check_size(name, size)
        self.codebook_size, self.codebooks, self.ranks = codebook_size, tuple(codebooks), Ranks(process_group)
        self.reset()

    def reset(self) -> None:
        """Forgets all rows."""
        self.counts = torch.zeros(*self.codebooks, self.codebook_size, dtype=torch.int64)

    @torch.no_grad()
    def update(self, indices: Tensor) -> None:
        """Counts integer indices `(..., *codebooks)`; -1 counts nowhere. Nothing is read from the device.

        Raises:
            TypeError: the indices are no tensor.
            ValueError: the last axes of the indices are not `codebooks`, or they are no integers.
        """
        number, expected = len(self.codebooks), ", ".join(("...", *map(str, self.codebooks)))
        if not isinstance(indices, Tensor):
            raise TypeError(f"indices must be a tensor of integers ({expected}), got {type(indices).__name__}")
        counted = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
        if not counted or tuple(indices.shape[indices.dim() - number :]) != self.codebooks:
            raise ValueError(f"indices must be integers ({expected}), got {indices.dtype} {list(indices.shape)}")
        flat = indices.to(torch.int64).reshape(-1, max(1, self.counts.numel() // self.codebook_size)).T
        places = torch.where((flat >= 0) & (flat < self.codebook_size), flat, self.codebook_size)
        counts = flat.new_zeros(len(flat), self.codebook_size + 1)
        counts.scatter_add_(1, places, torch.ones_like(places))
        self.counts = self.counts.to(flat.device) + counts[:, :-1].view_as(self.counts)

    def compute(self) -> Usage:
        """The measures over all rows of all ranks since the last reset; with a process group every rank calls it."""
        counts = self.ranks.sum(self.counts)[0]
        return Usage(perplexity(counts), usage(counts), dead_codes(counts))
