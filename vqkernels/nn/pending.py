"""Statistics of this rank until the next `update_codebook()`: plain tensors, which no wrapper sends or averages."""

from typing import NamedTuple

import torch
from torch import Tensor

from .revival import Candidates, candidate_count


class Pending(NamedTuple):
    """Counts, sums and, where codes revive, candidates of the forwards since the last update."""

    counts: Tensor
    sums: Tensor
    candidates: Candidates | None

    @classmethod
    def of_no_forward(cls, codebook: Tensor, heads: int | None) -> "Pending":
        """Zeros where the codebook `(..., K, D)` is; `heads` of the rows that revival draws from, or None without."""
        device, (size, dim) = codebook.device, codebook.shape[-2:]
        dtype = torch.promote_types(codebook.dtype, torch.float32)
        counts = torch.zeros(codebook.shape[:-1], dtype=torch.int64, device=device)
        sums = torch.zeros(codebook.shape, dtype=dtype, device=device)
        if heads is None:
            return cls(counts, sums, None)
        drawn = (heads, candidate_count(size))
        rows = torch.zeros(*drawn, dim, dtype=dtype, device=device)
        return cls(counts, sums, Candidates(rows, torch.zeros(drawn, dtype=torch.bool, device=device)))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.counts, self.sums, *(self.candidates or ())]

    def follow(self, codebook: Tensor) -> "Pending":
        """The same where the codebook is now, as wide as it is."""
        device, dtype = codebook.device, torch.promote_types(codebook.dtype, torch.float32)
        drawn = self.candidates
        candidates = drawn and Candidates(drawn.rows.to(device, dtype), drawn.usable.to(device))
        return Pending(self.counts.to(device), self.sums.to(device, dtype), candidates)
