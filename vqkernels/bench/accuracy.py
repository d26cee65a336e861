"""Counts wrong indices of all contenders, before anything is timed.

`vqkernels.reference` searches a random sample of rows again, and every other row on which two contenders disagree. So a
row is left unchecked only if all contenders gave the same index.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqkernels import reference

_SCORES = 5e8  # at most so many multiplications of the contract per case: about two seconds
_CHUNK = 1 << 22  # scores held at once


@dataclass(frozen=True)
class Accuracy:
    """`wrong` rows of each contender, among `checked` rows; `disputed` of them were checked because two disagreed."""

    wrong: dict[str, int]
    checked: int
    disputed: int


def contract(z: Tensor, codebook: Tensor) -> Tensor:
    """The reference's indices `(N,)`, or `(N, Q)` of a stack of codebooks, in pieces that fit in memory."""
    parts = z.split(max(1, _CHUNK // codebook.shape[-2]))
    if codebook.dim() == 3:
        return torch.cat([reference.residual_vector_quantize(part, codebook)[1] for part in parts])
    return torch.cat([reference.nearest(part, codebook) for part in parts])


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """The rows whose indices are not all the same."""
    return (one != other).view(len(one), -1).any(1)


def judge(z: Tensor, codebook: Tensor, answers: dict[str, Tensor]) -> Accuracy:
    """Compare everyone's indices, `(N,)` or `(N, Q)`, with the contract."""
    affordable = int(max(64, min(len(z), _SCORES / codebook.numel())))
    first, *others = answers.values()
    disputed = torch.zeros(len(z), dtype=torch.bool)
    for other in others:
        disputed |= _differ(other, first)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randperm(len(z), generator=generator)[:affordable]
    contested = disputed.nonzero()[:, 0]
    contested = contested[torch.randperm(len(contested), generator=generator)[:affordable]]
    rows = torch.cat([sample, contested]).unique()
    truth = contract(z[rows], codebook)
    wrong = {name: int(_differ(answer[rows], truth).sum()) for name, answer in answers.items()}
    return Accuracy(wrong, len(rows), len(contested))
