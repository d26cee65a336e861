"""The contract suite: compares one backend on one device with `vqkernels.reference`, claim by claim.

Fresh memory holds NaN or INT_MAX throughout, so that an unwritten element is noticed. A GPU backend compiles its
kernels again for each number of channels and each dtype. So not every combination is tested: every adversary with every
metric at every size in float32, and with every dtype at one size.
"""

import contextlib
import itertools
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..backends import counter
from ..backends.table import serves
from ..ops.nearest import nearest_code
from ..ops.quantize import quantize_with_statistics, vector_quantize
from ..ops.sample import sample_code
from ..ops.statistics import codebook_statistics
from ..reference import METRICS
from . import entropy, residual
from .adversaries import ADVERSARIES
from .layouts import LAYOUTS, flat, flat_rows
from .place import REGIMES, Case, Place, close

TYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
)
SINGLE = (torch.float32, torch.float32)
# every dtype at the common size, and more channels than one tile holds
PASSES = (*((types, 0) for types in (SINGLE, *TYPES)), (SINGLE, 4))


class Outcome(NamedTuple):
    """One claim about one operator, and the cases that broke it."""

    operator: str
    claim: str
    cases: int
    seconds: float
    failures: tuple[str, ...]


def exact_indices(which: int, place: Place) -> Iterator[Case]:
    size = place.sizes[which]
    for name, make in ADVERSARIES.items():
        for metric in METRICS:

            def case(make=make, metric=metric) -> bool:
                return _index(place, make(*size), metric)

            yield f"{name}, {size}, {metric}", case


def exact_indices_of_types(place: Place) -> Iterator[Case]:
    for types in TYPES:
        for name, make in ADVERSARIES.items():

            def case(make=make, types=types) -> bool:
                z, codebook = make(*place.sizes[0])
                return _index(place, (z.to(types[0]), codebook.to(types[1])), "euclidean")

            yield f"{name}, {types[0]}/{types[1]}", case


def _index(place: Place, pair: tuple[Tensor, Tensor], metric: str) -> bool:
    z, codebook = (x.to(place.device) for x in pair)
    found = nearest_code(z, codebook, metric=metric, backend=place.backend)
    return found.equal(reference.nearest(z, codebook, metric=metric))


def fast_is_nearly_nearest(place: Place) -> Iterator[Case]:
    """The code of "fast" is farther than the nearest code by no more than the rounding of sixteen-bit operands."""
    for n, k, d in place.sizes[:2]:

        def case(n=n, k=k, d=d) -> bool:
            z, codebook = (x.to(place.device) for x in ADVERSARIES["gaussian"](n, k, d))
            found = nearest_code(z, codebook, precision="fast", backend=place.backend)
            scores = reference.scores(z, codebook)
            excess = scores.gather(1, found[:, None]).squeeze(1) - scores.min(1).values
            return bool((excess <= 2.0**-9 * z.norm(dim=1).max() * codebook.norm(dim=1).max()).all())

        yield f"gaussian, {(n, k, d)}", case


def layouts_and_masks(place: Place) -> Iterator[Case]:
    """Masked rows hold NaN: if one is read, the index, the output or the loss is wrong."""
    for name, make in LAYOUTS.items():
        for masked in (False, True):

            def case(make=make, masked=masked) -> bool:
                z, channel_dim, codebook, mask = make(masked, place.device)
                quantized, indices, loss, _ = vector_quantize(
                    z, codebook, mask=mask, channel_dim=channel_dim, backend=place.backend
                )
                rows = flat(z, channel_dim, codebook.dim() == 3)
                kept = None if mask is None else flat_rows(mask, codebook.dim() == 3)
                expected = reference.nearest(rows, codebook, mask=kept)
                out = flat(quantized, channel_dim, codebook.dim() == 3)
                values, error = _looked_up(rows, codebook, expected)
                same = flat_rows(indices, codebook.dim() == 3).equal(expected) and out.equal(values.to(z.dtype))
                return same and close(loss, error / max(1, int((expected >= 0).sum()) * rows.shape[-1]), 1e-6)

            yield f"{name}{', masked' * masked}", case


def values_and_loss(place: Place) -> Iterator[Case]:
    for types, which in PASSES:
        for name in ("gaussian", "clustered", "offset 1e4", "subnormal", "non-finite rows", "non-finite codes"):

            def case(name=name, types=types, which=which) -> bool:
                z, codebook = (x.to(place.device, t) for x, t in zip(_pair(place, name, which), types, strict=True))
                quantized, indices, loss, commitment = vector_quantize(z, codebook, backend=place.backend)
                values, error = _looked_up(z, codebook, indices)
                exact = quantized.equal(values.to(z.dtype)) and loss.nan_to_num(7).equal(commitment.nan_to_num(7))
                return exact and close(loss, error / z.numel(), 1e-6)

            yield f"{name}, {types[0]}/{types[1]}, {place.sizes[which]}", case


def _looked_up(z: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the indices, zeros where masked, and the float64 squared error of the rows that count."""
    if codebook.dim() == 3:
        parts = [_looked_up(*one) for one in zip(z, codebook, indices, strict=True)]
        return torch.stack([v for v, _ in parts]), torch.stack([e for _, e in parts]).sum()
    kept = (indices >= 0).unsqueeze(-1)
    values = torch.where(kept, codebook[indices.clamp_min(0)], 0.0)
    wide = torch.where(kept, z, 0.0).double()
    # a row with an infinity makes the loss NaN by contract, not infinite
    return values, (wide - values.double()).square().sum() + (wide * 0.0).sum()


def sums_and_counts(place: Place) -> Iterator[Case]:
    for types, which in PASSES:
        for name in ("gaussian", "clustered", "collapsed", "non-finite rows"):

            def case(name=name, types=types, which=which) -> bool:
                z, codebook = (x.to(place.device, t) for x, t in zip(_pair(place, name, which), types, strict=True))
                found = quantize_with_statistics(z, codebook, backend=place.backend)
                counts, sums = codebook_statistics(z, found.indices, len(codebook), backend=place.backend)
                expected_counts, expected_sums = reference.statistics(z, found.indices, len(codebook))
                scale = 1e-12 if z.dtype == torch.float64 else 1e-6
                return (
                    counts.equal(expected_counts)
                    and found.counts[0].equal(counts)
                    and found.sums[0].equal(sums)
                    and close(sums, expected_sums, scale)
                )

            yield f"{name}, {types[0]}/{types[1]}, {place.sizes[which]}", case


def given_indices(place: Place) -> Iterator[Case]:
    """The indices of a search, given again, give the same bits. Masked rows are given another index."""
    for name, make in LAYOUTS.items():
        for masked in (False, True):

            def case(make=make, masked=masked) -> bool:
                z, channel_dim, codebook, mask = make(masked, place.device)
                arguments: dict[str, Any] = {"channel_dim": channel_dim, "mask": mask, "backend": place.backend}
                searched = quantize_with_statistics(z, codebook, **arguments)
                given = searched.indices if mask is None else searched.indices.where(mask, 5)
                found = quantize_with_statistics(z, codebook, indices=given, **arguments)
                return all(x.equal(y) for x, y in zip(found, searched, strict=True))

            yield f"{name}{', masked' * masked}", case


def sampled_codes(place: Place) -> Iterator[Case]:
    """Every draw has the largest score plus noise, up to the rounding of float32 scores."""
    n, k, d = place.sizes[0]
    for metric, temperature, name in itertools.product(METRICS, (0.5, 50.0), ("gaussian", "offset 1e4", "zero codes")):

        def case(metric=metric, temperature=temperature, name=name) -> bool:
            z, codebook = (x.to(place.device) for x in ADVERSARIES[name](n, k, d))
            if metric != "euclidean" and name == "offset 1e4":
                z, codebook = (
                    z - 1e4,
                    codebook - 1e4,
                )  # products of such rows are too large for the noise to matter in float32
            seed = torch.tensor(7, device=place.device)
            found = sample_code(
                z, codebook, temperature=temperature, seed=seed, metric=metric, row_offset=3, backend=place.backend
            )
            score = -reference.scores(z, codebook, metric) / temperature
            keys = counter.row_keys(seed, 0, torch.arange(len(z), device=place.device) + 3)
            numbers = torch.arange(len(codebook), device=place.device)
            total = score + counter.gumbel(counter.code_bits(keys[:, None], numbers))
            behind = total.amax(1) - total.gather(1, found[:, None]).squeeze(1)
            return bool((behind <= 1e-5 * (1 + score.amax(1).abs())).all())

        yield f"{name}, {metric}, temperature {temperature}", case


def repeated_bits(place: Place) -> Iterator[Case]:
    for name in ("gaussian", "clustered", "collapsed"):

        def case(name=name) -> bool:
            z, codebook = (x.to(place.device) for x in _pair(place, name))
            first, second = (_everything(place, z, codebook) for _ in range(2))
            return all(x.equal(y) for x, y in zip(first, second, strict=True))

        yield name, case


def _everything(place: Place, z: Tensor, codebook: Tensor) -> list[Tensor]:
    """Every output and gradient of one training step."""
    z, codebook = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    result = quantize_with_statistics(z, codebook, backend=place.backend)
    loss = (result.quantized * 1.25).sum() + 0.5 * result.commitment_loss + 2 * result.codebook_loss
    return [*(x.detach() for x in result), *torch.autograd.grad(loss, (z, codebook))]


def gradients(place: Place) -> Iterator[Case]:
    """Compared with float64 autograd through the reference, on the stored values; each incoming gradient alone too."""
    yield from _gradients(place, "straight_through")


def rotated_gradients(place: Place) -> Iterator[Case]:
    yield from _gradients(place, "rotation")


def _gradients(place: Place, mode: str) -> Iterator[Case]:
    tolerances = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
    passes = [(dtype, None, 0) for dtype in tolerances] + [(torch.float64, i, 0) for i in range(3)]
    for dtype, alone, which in [*passes, (torch.float32, None, 4)]:

        def case(dtype=dtype, tolerance=tolerances[dtype], alone=alone, which=which) -> bool:
            z, codebook = (x.to(place.device, dtype) for x in _pair(place, "gaussian", which))
            z, codebook = z[:400].clone(), codebook[:300].clone()
            mask = torch.rand(len(z), device=place.device) < 0.8
            weights = [torch.randn_like(z), *torch.randn(2, device=place.device, dtype=torch.float64).unbind()]
            weights = [w if alone in (None, i) else torch.zeros_like(w) for i, w in enumerate(weights)]

            def grads(compute: Callable[[Tensor, Tensor], tuple], cast: torch.dtype) -> tuple[Tensor, ...]:
                inputs = z.to(cast).requires_grad_(), codebook.to(cast).requires_grad_()
                quantized, _, codebook_loss, commitment = compute(*inputs)
                total = (quantized * weights[0].to(cast)).sum()
                return torch.autograd.grad(
                    total + codebook_loss * weights[1] + commitment * weights[2], inputs, materialize_grads=True
                )

            found = grads(lambda x, e: vector_quantize(x, e, mask=mask, gradient=mode, backend=place.backend), dtype)
            expected = grads(lambda x, e: reference.vector_quantize(x, e, mask=mask, gradient=mode), torch.float64)
            return all(close(x, y, tolerance) for x, y in zip(found, expected, strict=True))

        yield f"{dtype}, incoming {'all' if alone is None else alone}, {place.sizes[which]}", case


def poisoned_rows_stay_alone(place: Place) -> Iterator[Case]:
    def case() -> bool:
        z, codebook = (x.to(place.device) for x in _pair(place, "non-finite rows"))
        bad = ~z.isfinite().all(1)
        grads = _everything(place, z, codebook)[-2:]
        return bool(grads[0][bad].isnan().all() and grads[0][~bad].isfinite().all() and grads[1].isfinite().all())

    yield "non-finite rows", case


def _pair(place: Place, name: str, which: int = 0) -> tuple[Tensor, Tensor]:
    return ADVERSARIES[name](*place.sizes[which])


CLAIMS: tuple[tuple[str, str, Callable[[Place], Iterator[Case]]], ...] = (
    *(
        ("nearest", f"index equals the contract's, {regime}", partial(exact_indices, i))
        for i, regime in enumerate(REGIMES)
    ),
    ("nearest", "index equals the contract's, other dtypes", exact_indices_of_types),
    ("nearest", "fast is within sixteen-bit rounding", fast_is_nearly_nearest),
    ("quantize", "layouts and masks, masked rows unread", layouts_and_masks),
    ("quantize", "looked-up values and losses", values_and_loss),
    ("lookup", "given indices give the bits of the search", given_indices),
    ("sample", "draws follow their scores and the noise", sampled_codes),
    ("statistics", "counts exact, sums to rounding", sums_and_counts),
    ("backward", "gradients equal the reference's", gradients),
    ("backward", "rotated gradients equal the reference's", rotated_gradients),
    ("backward", "a poisoned row harms itself alone", poisoned_rows_stay_alone),
    ("residual", "indices of every level, sums and statistics", residual.values),
    ("residual", "gradients of every level equal the reference's", residual.gradients),
    ("entropy", "both entropies, masked rows unread", entropy.values),
    ("entropy", "gradients of the entropies equal the reference's", entropy.gradients),
    ("all", "same bits when repeated", repeated_bits),
)


# the operator that a claim is about, where the claim's name is not that of one
NEEDED = {"backward": "quantize_backward", "residual": "residual_quantize", "all": "quantize_backward"}


def claims_about(backend: str) -> list[int]:
    """The numbers of the claims that are about operators which the backend has."""
    return [i for i, (operator, _, _) in enumerate(CLAIMS) if serves(backend, NEEDED.get(operator, operator))]


def verify(backend: str, device: torch.device, *, every: int = 1, workers: int = 1) -> Iterator[Outcome]:
    """Try every claim; yields one outcome each, in order.

    With `every=n` only one in n cases of a claim is tested: a quick check, no proof. With several `workers`, as many
    processes share the claims, because on a GPU most of the time is compiling.
    """
    tasks = [(number, backend, str(device), every) for number in claims_about(backend)]
    if workers == 1:
        yield from itertools.starmap(_try, tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(_try, *task) for task in tasks]:
            yield future.result()


def _try(number: int, backend: str, device: str, every: int) -> Outcome:
    """One claim. A kernel that raises has failed its case."""
    operator, claim, cases = CLAIMS[number]
    start, count, failures = time.perf_counter(), 0, []
    with poisoned_memory():
        for name, holds in itertools.islice(cases(Place(backend, torch.device(device))), 0, None, every):
            torch.manual_seed(count)
            count += 1
            try:
                if not holds():
                    failures.append(name)
            except Exception as error:  # any: of a compiler, a driver or the kernel
                failures.append(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return Outcome(operator, claim, count, time.perf_counter() - start, tuple(failures))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN or INT_MAX. Settings are restored."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # its attribute is a property that type checkers do not see
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = fill
