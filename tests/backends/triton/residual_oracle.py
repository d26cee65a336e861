"""Residual quantization, plainly, on the reference's search: z (N, D), codebooks (Q, K, D), levels (N,)."""

from typing import NamedTuple

import torch

from vqkernels import reference


class Expected(NamedTuple):
    """What the kernels must give, bit for bit but for the sums over rows."""

    quantized: torch.Tensor
    indices: torch.Tensor  # (N, Q)
    squared_errors: torch.Tensor  # (Q,)
    counts: torch.Tensor  # (Q, K)
    sums: torch.Tensor  # (Q, K, D)


def wide_or_single(*tensors):
    """float64 where one of them is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def residuals(z, codebooks, indices):
    """The residual that every level searches, (Q, N, D), and the codes it found there (0 where it is not passed)."""
    r, kind = z.to(wide_or_single(z)), wide_or_single(z, codebooks)
    searched, found = [], []
    for level, codebook in enumerate(codebooks):
        passed = indices[:, level : level + 1] >= 0
        e = codebook[indices[:, level].clamp_min(0)]
        searched.append(torch.where(passed, r, 0))
        found.append(torch.where(passed, e, 0))
        r = torch.where(passed, (r.to(kind) - e.to(kind)).to(r.dtype), r)
    return torch.stack(searched), torch.stack(found)


def forward(z, codebooks, levels=None, metric="euclidean"):
    """The specification, one level after the other."""
    depth, codes, _ = codebooks.shape
    levels = torch.full((len(z),), depth) if levels is None else levels
    r, kind = z.to(wide_or_single(z)), wide_or_single(z, codebooks)
    summed = wide_or_single(codebooks)  # decoding, which has no z, adds in the same type
    total = torch.zeros(z.shape, dtype=summed)
    indices = torch.full((len(z), depth), -1)
    errors, counts, sums = [], [], []
    for level, codebook in enumerate(codebooks):
        passed = levels > level
        indices[:, level] = reference.nearest(torch.where(passed[:, None], r, 0), codebook, mask=passed, metric=metric)
        bad = passed & ~r.isfinite().all(1)
        indices[bad, level] = 0
        e = codebook[indices[:, level].clamp_min(0)]
        error = (r.double() - e.double()).square().sum(1).masked_fill(bad, torch.nan)
        errors.append(error[passed].sum())
        n, s = reference.statistics(r, indices[:, level], codes)
        counts.append(n)
        sums.append(s)
        total = torch.where(passed[:, None], e.to(summed) if level == 0 else total + e.to(summed), total)
        r = torch.where(passed[:, None], (r.to(kind) - e.to(kind)).to(r.dtype), r)
    return Expected(total.to(z.dtype), indices, torch.stack(errors), torch.stack(counts), torch.stack(sums))


def backward(incoming, codebook_losses, commitment_losses, z, codebooks, indices, gradient="straight_through"):
    """(grad_z (N, D), grad_codebooks (Q, K, D)) in float64, of the stored residuals."""
    searched, codes = (x.double() for x in residuals(z, codebooks, indices))
    passed = indices.T >= 0  # (Q, N)
    elements = passed.sum(1).clamp_min(1) * z.shape[1]
    grad_z = incoming.double()
    if gradient == "rotation":
        kind = wide_or_single(codebooks)
        total = codes[0].to(kind)
        for e in codes[1:]:
            total = total + e.to(kind)
        step = torch.zeros_like(grad_z, requires_grad=True)
        row = torch.where(passed[0][:, None], z, 0).double()
        grad_z = torch.autograd.grad(reference.rotate(step, row, total.double()), step, grad_z)[0]
    factors = 2.0 / elements.double()
    finite = searched.isfinite().all(2)
    grad_codebooks = torch.zeros(codebooks.shape, dtype=torch.float64)
    for level in range(len(codebooks)):
        difference = searched[level] - codes[level]
        grad_z = grad_z + commitment_losses[level] * factors[level] * difference * passed[level][:, None]
        for i in (passed[level] & finite[level]).nonzero()[:, 0].tolist():
            grad_codebooks[level, indices[i, level]] -= difference[i] * factors[level] * codebook_losses[level]
    grad_z = torch.where((passed & ~finite).any(0)[:, None], torch.nan, grad_z)
    return torch.where(passed[0][:, None], grad_z, 0), grad_codebooks
