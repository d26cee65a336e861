"""Claims about the entropy loss: both entropies and their gradients, compared with the reference in float64."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import reference
from ..ops.entropy import METRICS, entropy_loss
from .adversaries import ADVERSARIES
from .place import Case, Place, close

NAMES = ("gaussian", "clustered", "duplicated codes", "zero codes", "non-finite codes", "non-finite rows")
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def values(place: Place) -> Iterator[Case]:
    """Masked rows hold NaN: if one is read, both entropies are NaN."""
    cases = [(name, torch.float32, 0) for name in NAMES]
    cases += [("gaussian", dtype, 0) for dtype in TYPES[1:]]
    cases += [("gaussian", torch.float32, which) for which in (1, 2, 3, 4)]
    for name, dtype, which in cases:
        for metric in METRICS:

            def case(name=name, dtype=dtype, which=which, metric=metric) -> bool:
                z, codebook, temperature = _problem(place, name, dtype, which)
                mask = torch.arange(len(z), device=place.device) % 5 != 3
                hidden = z.masked_fill(~mask[:, None], torch.nan)
                found = entropy_loss(hidden, codebook, temperature, mask=mask, metric=metric, backend=place.backend)
                expected = reference.entropy_loss(z, codebook, temperature, mask=mask, metric=metric)
                tolerance = 1e-10 if dtype == torch.float64 else 1e-4
                return all(close(x, y, tolerance) for x, y in zip(found, expected, strict=True))

            yield f"{name}, {dtype}, {place.sizes[which]}, {metric}", case


def gradients(place: Place) -> Iterator[Case]:
    """Compared with autograd through the reference in float64, on the stored values; each entropy alone too."""
    passes = [(torch.float64, 1e-9, alone) for alone in (None, 0, 1)] + [(torch.float32, 1e-3, None)]
    for dtype, tolerance, alone in passes:
        for metric in METRICS:

            def case(dtype=dtype, tolerance=tolerance, alone=alone, metric=metric) -> bool:
                z, codebook, temperature = _problem(place, "gaussian", dtype, 0)
                mask = torch.arange(len(z), device=place.device) % 5 != 3
                weights = [w if alone in (None, i) else 0.0 for i, w in enumerate((1.25, -0.5))]

                def grads(compute: Callable[[Tensor, Tensor], tuple], cast: torch.dtype) -> tuple[Tensor, ...]:
                    inputs = z.to(cast).requires_grad_(), codebook.to(cast).requires_grad_()
                    sample, whole = compute(*inputs)
                    return torch.autograd.grad(weights[0] * sample + weights[1] * whole, inputs)

                options = {"mask": mask, "metric": metric}
                found = grads(lambda x, e: entropy_loss(x, e, temperature, backend=place.backend, **options), dtype)
                wide = grads(lambda x, e: reference.entropy_loss(x, e, temperature, **options), torch.float64)
                return all(close(x, y, tolerance) for x, y in zip(found, wide, strict=True))

            yield f"{dtype}, {metric}, incoming {'both' if alone is None else alone}", case


def _problem(place: Place, name: str, dtype: torch.dtype, which: int) -> tuple[Tensor, Tensor, float]:
    """Rows, codes, and a temperature at which most rows have several probable codes."""
    z, codebook = (x.to(place.device, dtype) for x in ADVERSARIES[name](*place.sizes[which]))
    return z[:600], codebook[:400], float(z.shape[1])
