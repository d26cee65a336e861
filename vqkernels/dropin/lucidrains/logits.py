"""Cross entropy against codes, and draws of codes. Both need all distances of a row, not only the smallest.

The logits are minus the euclidean distance, or the dot product if the codes are directions. They are computed for a
block of rows at a time, at most 16 MB for any N and K, and not kept. The cross entropy computes its gradient in the
same pass; backward only scales it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

_BLOCK_ELEMENTS = 1 << 22
_LEAST_SQUARE = 1e-8  # below it the peer's distance is constant


def _logits(rows: Tensor, codes: Tensor, directions: bool) -> Tensor:
    product = rows @ codes.T
    if directions:
        return product
    square = rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * product
    return -square.clamp_min(_LEAST_SQUARE).sqrt()


def _blocks(number: int, codebook_size: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // codebook_size)
    return (slice(start, start + step) for start in range(0, number, step))


def _as_it_is(x: Tensor) -> Tensor:
    return x


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, codes: Tensor, targets: Tensor, directions: bool) -> Tensor:
        finite = rows.isfinite().all(-1) | (targets < 0)
        rows, targets = rows.masked_fill(~finite.unsqueeze(-1), 0), torch.where(finite, targets, -1)
        total = torch.where(finite.all(), 0.0, torch.nan).to(torch.float64)
        grad_rows = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        grad_codes = torch.zeros_like(codes) if ctx.needs_input_grad[1] else None
        for head in range(len(codes)):
            code = codes[head].detach().requires_grad_(grad_codes is not None)
            for block in _blocks(rows.shape[1], codes.shape[1]):
                row = rows[head, block].detach().requires_grad_(grad_rows is not None)
                # A separate graph. The hooks of a checkpoint around the layer would compute the layer again for it.
                with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
                    logits = _logits(row, code, directions)
                    loss = F.cross_entropy(logits, targets[head, block], ignore_index=-1, reduction="sum")
                total += loss.detach()
                wanted = [x for x in (row, code) if x.requires_grad]
                found = iter(torch.autograd.grad(loss, wanted) if wanted else ())
                if grad_rows is not None:
                    grad_rows[head, block] = next(found)
                if grad_codes is not None:
                    grad_codes[head] += next(found)
        if grad_rows is not None:
            grad_rows.masked_fill_(~finite.unsqueeze(-1), torch.nan)
        counted = (targets >= 0).sum().clamp_min(1)
        ctx.save_for_backward(grad_rows, grad_codes, counted)
        return (total / counted).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        grad_rows, grad_codes, counted = ctx.saved_tensors
        scale = gradient / counted
        grad_rows = None if grad_rows is None else grad_rows * scale
        return grad_rows, None if grad_codes is None else grad_codes * scale, None, None


def cross_entropy(rows: Tensor, codes: Tensor, targets: Tensor, directions: bool) -> Tensor:
    """Mean cross entropy of `softmax(logits)` against codes, 0-d; 0 where no row counts.

    Args:
        rows: `(h, N, D)`, the rows of each codebook.
        codes: `(h, K, D)`.
        targets: int64 `(h, N)` in [-1, K); -1 marks a row that does not count, whose gradient is 0.
        directions: dot products instead of distances.

    A row with a NaN or an infinity makes the result NaN, gets a NaN gradient, and gives nothing to the codes' gradient.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    rows = rows.masked_fill((targets < 0).unsqueeze(-1), 0)
    with torch.autocast(rows.device.type, enabled=False):
        return _CrossEntropy.apply(rows, codes.to(rows.dtype), targets, directions)


@torch.no_grad()
def draw_codes(rows: Tensor, codes: Tensor, temperature: float, directions: bool) -> Tensor:
    """Codes `(h, N)` int64 drawn with probability `softmax(logits / temperature)`, by torch's own random numbers."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    codes = codes.to(rows.dtype)
    drawn = torch.empty(rows.shape[:2], dtype=torch.int64, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        for head in range(len(codes)):
            for block in _blocks(rows.shape[1], codes.shape[1]):
                logits = _logits(rows[head, block], codes[head], directions) / temperature
                logits = logits.masked_fill(logits.isnan(), -torch.inf)
                noise = torch.rand_like(logits).clamp_min(1e-20).log().neg().clamp_min(1e-20).log().neg()
                drawn[head, block] = (logits + noise).argmax(1)
    return drawn
