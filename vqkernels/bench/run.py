"""Runs the cases: first correctness, then times, then memory in a separate process."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqkernels.ops.nearest import nearest_code

from . import memory
from .accuracy import Accuracy, judge
from .cases import HIDDEN, IMAGES, SIDE, Case
from .contenders import CONTENDERS
from .entropy_peers import mistake
from .layers import Layer, OneHotQuantizer
from .peers import SEARCH, Peer, too_large, unavailable
from .timing import Timing, interleave


class WrongIndex(AssertionError):
    """An index or an entropy of ours differs from the contract. Nothing is timed after that."""


@dataclass(frozen=True)
class Result:
    """One contender at one case. None is "not measured"; `problem` says why a contender did not run."""

    case: Case
    contender: str
    computes: str
    ours: bool
    competes: bool  # whether it may be the best peer
    timing: Timing | None = None
    peak: float | None = None  # multiply-add peak, operations per second
    megabytes: float | None = None
    wrong: int | None = None
    checked: int = 0
    decided: float | None = None  # fraction of rows that our filter decided
    problem: str = ""


@dataclass(frozen=True)
class Effort:
    """Limits of a run: minutes in all, and rounds per case between `least` and `most`."""

    threads: int
    minutes: float = 9.0
    least: int = 5
    most: int = 25
    quick: bool = False


ModelFactory = Callable[[int], Any]  # codebook size -> a VQ-VAE with a `quantizer`, for images of 3 channels


def run(cases: list[Case], effort: Effort, make_model: ModelFactory) -> Iterator[list[Result]]:
    """Yields the results of each case as they come, and at the end all of them again with their memory."""
    deadline = time.perf_counter() + 60 * effort.minutes * 0.8  # the other fifth is for memory
    every: list[Result] = []
    for number, case in enumerate(cases):
        share = max(0.0, deadline - time.perf_counter()) / (len(cases) - number)
        results = _vqvae(case, effort, share, make_model) if case.kind == "vqvae" else _case(case, effort, share)
        every += results
        yield results
    jobs = [(x.case, x.contender) for x in every if x.timing is not None and x.case.kind != "vqvae"]
    # The compiler's own memory would count as its contender's.
    jobs = [job for job in jobs if not any(p.name == job[1] and p.slow_start for p in SEARCH)]
    megabytes = memory.measure(jobs, effort.threads)
    yield [dataclasses.replace(x, megabytes=megabytes.get((x.case, x.contender))) for x in every]


def _able(contenders: Iterable[Peer | Layer], case: Case, quick: bool) -> tuple[list[Peer | Layer], dict[str, str]]:
    """The contenders that can run, and why the others cannot, by name."""
    able, problems = [], {}
    for one in contenders:
        problem = unavailable(one.module, one.package) or too_large(one.matrices, case.rows, case.codebook_size)
        if quick and isinstance(one, Peer) and one.slow_start:
            problem = "left out of --quick"
        if problem:
            problems[one.name] = problem
        else:
            able.append(one)
    return able, problems


def _case(case: Case, effort: Effort, share: float) -> list[Result]:
    contenders = CONTENDERS[case.kind]
    able, problems = _able(contenders, case, effort.quick)
    z, codebook = case.data()
    calls: dict[str, Callable[[], Any]] = {}
    answers: dict[str, Tensor] = {}
    known: dict[str, float] = {}
    for one in able:
        try:
            calls[one.name] = one.prepare(z, codebook)
            start = time.perf_counter()
            answer = calls[one.name]()
            if not getattr(one, "slow_start", False):
                known[one.name] = time.perf_counter() - start
            if answer.dtype == torch.int64 and answer.numel() == case.rows * case.levels:
                answers[one.name] = answer.clone()
        except Exception as error:  # a peer that fails is reported, and the others still run
            if one.ours:
                raise
            calls.pop(one.name, None)
            problems[one.name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    accuracy, decided = Accuracy({}, 0, 0), None
    if case.kind == "entropy":
        _refuse_entropies(z, codebook, case)
    else:
        accuracy = judge(z, codebook, answers)
        if codebook.dim() == 2:
            decided = float(nearest_code(z, codebook, return_certificate=True)[1])
        _refuse([one.name for one in able if one.ours], accuracy, case)
    timings, peak = interleave(calls, effort.threads, share, effort.least, effort.most, known)
    return [
        Result(
            case,
            one.name,
            one.computes,
            one.ours,
            not one.ours and getattr(one, "searches", True),
            timings.get(one.name),
            peak.median if peak else None,
            wrong=accuracy.wrong.get(one.name),
            checked=accuracy.checked if one.name in accuracy.wrong else 0,
            decided=decided if one.ours else None,
            problem=problems.get(one.name, ""),
        )
        for one in contenders
    ]


def _refuse(ours: list[str], accuracy: Accuracy, case: Case) -> None:
    for name in ours:
        if accuracy.wrong.get(name):
            raise WrongIndex(f"{name} gave {accuracy.wrong[name]} wrong indices at {case.label}: nothing was timed")


def _refuse_entropies(z: Tensor, codebook: Tensor, case: Case) -> None:
    problem = mistake(z, codebook)
    if problem:
        raise WrongIndex(f"vqkernels at {case.label}: {problem}: nothing was timed")


def _vqvae(case: Case, effort: Effort, share: float, make_model: ModelFactory) -> list[Result]:
    """A training step of a VQ-VAE (forward, backward, Adam) with our layer, the one-hot layer, and no quantizer."""
    images = torch.rand(IMAGES if not effort.quick else 2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    codes = torch.randn(case.codebook_size, case.dim, generator=torch.Generator().manual_seed(1))
    usual = OneHotQuantizer(codes.clone() * 0.1)
    quantizers = {
        "vqkernels": ("our layer, codebook loss", None),
        "one-hot layer": ("the usual tutorial's layer", usual),
        "no quantizer": ("the same model without one: for scale", _Through()),
    }
    steps: dict[str, Callable[[], Any]] = {}
    for name, (_, quantizer) in quantizers.items():
        model = make_model(case.codebook_size)
        if quantizer is not None:
            model.quantizer = quantizer
        else:
            model.quantizer.codebook.data.copy_(usual.codebook.data)
        steps[name] = _model_step(model, images)
    timings, peak = interleave(steps, effort.threads, share, effort.least, effort.most)
    return [
        Result(
            case,
            name,
            f"{computes}; VQ-VAE of {HIDDEN} channels, {len(images)} images of {SIDE}x{SIDE}",
            name == "vqkernels",
            name == "one-hot layer",
            timings[name],
            peak.median if peak else None,
        )
        for name, (computes, _) in quantizers.items()
    ]


class _Through(nn.Module):
    """A quantizer that does nothing."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return z, torch.zeros(0, dtype=torch.int64), z.new_zeros(())


def _model_step(model: Any, images: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(images)[2].total.backward()
        optimizer.step()

    return step
