"""Claims about residual quantization: indices, sums and statistics of every level, and gradients."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import reference
from ..ops.residual import residual_quantize_with_statistics, residual_vector_quantize
from .adversaries import ADVERSARIES
from .place import Case, Place, close

LEVELS = 3
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def values(place: Place) -> Iterator[Case]:
    """All adversaries in float32, some in every dtype, and one with rows that stop at an earlier level."""
    few = ("gaussian", "clustered", "offset 1e4", "non-finite rows", "non-finite codes")
    cases = [(name, torch.float32, 0) for name in ADVERSARIES]
    cases += [(name, dtype, 0) for name in few for dtype in TYPES[1:]]
    cases += [("gaussian", torch.float32, which) for which in (1, 2, 3, 4)]
    for name, dtype, which in cases:
        for partly in (False, True) if name == "gaussian" else (False,):

            def case(name=name, dtype=dtype, which=which, partly=partly) -> bool:
                z, codebooks = _stack(place, name, dtype, which)
                passed = torch.arange(len(z), device=place.device) % (LEVELS + 1) if partly else None
                expected = reference.residual_vector_quantize(z, codebooks, levels=passed)
                found = residual_quantize_with_statistics(z, codebooks, levels=passed, backend=place.backend)
                counts, sums, errors = _statistics(z, codebooks, expected[1])
                scale = 1e-12 if dtype == torch.float64 else 1e-6
                return (
                    found.indices.equal(expected[1])
                    and found.quantized.nan_to_num(7).equal(expected[0].nan_to_num(7))
                    and found.counts[0].equal(counts)
                    and close(found.sums[0], sums, scale)
                    and all(close(x, y, 1e-5) for x, y in zip(found.codebook_losses[0], errors, strict=True))
                )

            yield f"{name}, {dtype}, {place.sizes[which]}{', some levels' * partly}", case


def _stack(place: Place, name: str, dtype: torch.dtype, which: int) -> tuple[Tensor, Tensor]:
    """Rows and levels. The later levels are the first one, scaled down and in another order."""
    z, codebook = (x.to(place.device, dtype) for x in ADVERSARIES[name](*place.sizes[which]))
    return z[:600], torch.stack([codebook[:400], 0.5 * codebook[:400].flip(0), 0.25 * codebook[:400]])


def _statistics(z: Tensor, codebooks: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts and sums of the residuals of every level, and the mean squared errors in float64."""
    rest = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    parts, errors = [], []
    for codes, index in zip(codebooks, indices.unbind(1), strict=True):
        parts.append(reference.statistics(rest, index, len(codes)))
        kept = (index >= 0)[:, None]
        step = torch.where(kept, rest.double() - codes[index.clamp_min(0)].double(), 0.0)
        poison = torch.where(kept, rest.double() * 0.0, 0.0)  # NaN if a row is not finite, like the loss
        errors.append((step.square() + poison).sum() / max(1, int(kept.sum()) * z.shape[1]))
        rest = torch.where(kept, step.to(rest.dtype), rest)
    return torch.stack([c for c, _ in parts]), torch.stack([s for _, s in parts]), torch.stack(errors)


def gradients(place: Place) -> Iterator[Case]:
    """Compared with autograd through the reference in float64, on the stored values."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for mode in ("straight_through", "rotation"):

            def case(dtype=dtype, tolerance=tolerance, mode=mode) -> bool:
                z, codebooks = _stack(place, "gaussian", dtype, 0)
                passed = torch.arange(len(z), device=place.device) % (LEVELS + 1)
                weights = torch.randn(2, LEVELS, device=place.device, dtype=torch.float64)
                incoming = torch.randn_like(z)

                def grads(compute: Callable[[Tensor, Tensor], tuple], cast: torch.dtype) -> tuple[Tensor, ...]:
                    inputs = z.to(cast).requires_grad_(), codebooks.to(cast).requires_grad_()
                    quantized, _, codebook_losses, commitment = compute(*inputs)
                    total = (quantized * incoming.to(cast)).sum() + (codebook_losses * weights[0]).sum()
                    return torch.autograd.grad(total + (commitment * weights[1]).sum(), inputs)

                options = {"levels": passed, "gradient": mode}
                found = grads(lambda x, e: residual_vector_quantize(x, e, backend=place.backend, **options), dtype)
                wide = grads(lambda x, e: reference.residual_vector_quantize(x, e, **options), torch.float64)
                return all(close(x, y, tolerance) for x, y in zip(found, wide, strict=True))

            yield f"{dtype}, {mode}", case
