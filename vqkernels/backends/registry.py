"""Chooses the backend that computes an operator, by the table, and explains the choice.

A named backend is taken or refused; only "auto" chooses, and it warns once when it has to take the fallback where a
kernel was expected: where it is unavailable, or on a GPU where it was never verified.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import cpu, cuda, proof, triton, verified
from .cuda import launch as launch  # defines the schemas of the CUDA launchers
from .table import BACKENDS, operators, serves

NAMES = ("auto", *BACKENDS)

cpu.load()  # the operators of the library are there from now on
_override: str = os.environ.get("VQKERNELS_BACKEND", "auto")
_warned: set[str] = set()
_choices: dict[tuple[str, torch.device, str | None], tuple[str, str, str]] = {}  # each is made once


def _check(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def resolve(backend: str, device: torch.device | str, operator: str | None = None) -> str:
    """The backend for tensors on `device`: "cpu", "triton", "cuda" or "eager". An explicit request never falls back.

    `operator` names what is to be computed: a backend need not compute every operator.
    """
    if isinstance(device, str):
        device = torch.device(device)
    if backend == "auto":
        backend = _override
    if backend not in NAMES:
        _check(backend)
    chosen, warning, refusal = _choice(backend, device, operator)
    if refusal:
        raise RuntimeError(refusal)
    if warning:
        _warn_once(warning)
    return chosen


def _choice(backend: str, device: torch.device, operator: str | None) -> tuple[str, str, str]:
    """The backend that computes; a warning where "auto" expected a kernel, or ""; why it is refused, or ""."""
    found = _choices.get((backend, device, operator))
    if found is None:
        if backend == "auto":
            found = (*_first(device, operator), "")
        else:
            found = (backend, "", _refusal(backend, device, operator))
        if device.type != "cuda" or device.index is not None:  # else it is the current GPU, which may change
            _choices[backend, device, operator] = found
    return found


# What torch.compiler.assume_constant_result sets, without its import of the compiler: facts of a process are constants.
_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _first(device: torch.device, operator: str | None) -> tuple[str, str]:
    """The first backend of the table that is available and proved, and what to warn of where that is the fallback."""
    reasons: list[str] = []
    proved = ""
    for name, backend in BACKENDS.items():
        if backend.device not in (device.type, None) or not serves(name, operator):
            continue
        problem, doubt = proof.state(name, device.index)
        if not problem and not doubt:
            if backend.device is not None or not reasons:
                return name, ""
            return name, f"vqkernels: {', and '.join(reasons)}; using the slower {name} backend{proved}"
        if doubt and not proved:
            reasons.append(doubt)
            proved = f" until `{backend.proof}` has proved them"
        elif not reasons:
            reasons.append(f"the {backend.title} are unavailable ({problem})")
    raise AssertionError("the last backend of the table serves every device")


def _refusal(backend: str, device: torch.device, operator: str | None) -> str:
    """Why a backend that was asked for cannot compute an operator there, or ""."""
    wanted = BACKENDS[backend].device
    if wanted not in (device.type, None):
        return f'backend "{backend}" computes {str(wanted).upper()} tensors, got a tensor on {device.type}'
    if problem := proof.state(backend, device.index)[0]:
        return f'backend "{backend}" is unavailable: {problem}'
    if operator is not None and not serves(backend, operator):
        return f'backend "{backend}" has no kernel for "{operator}"; it has {", ".join(operators(backend))}'
    return ""


def _warn_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def available(device: torch.device | str, operator: str | None = None) -> list[str]:
    """Every backend that can compute an operator, or all of them, on `device`, best first, verified or not."""
    device = torch.device(device)
    return [name for name in BACKENDS if serves(name, operator) and not _refusal(name, device, operator)]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context `backend="auto"` means `name`. Overrides the environment variable VQKERNELS_BACKEND."""
    global _override
    previous, _override = _override, _check(name)
    try:
        yield
    finally:
        _override = previous


def report() -> list[tuple[str, str]]:
    """What serves on this machine, as (label, text) lines for `vqkernels info`."""
    facts = cpu.build_facts()
    levels = cpu.simd_levels()
    problem, _ = proof.state("cpu")
    lines = [
        ("torch", torch.__version__),
        ("backend cpu", f"unavailable: {problem}" if problem else f"C++ kernels, {' '.join(levels)}"),
        ("SIMD level", os.environ.get("VQKERNELS_SIMD") or (levels[-1] if levels else "none")),
        *_triton_report(),
        *_cuda_report(),
        ("backend eager", "PyTorch operations, any device, same indices"),
        ("auto on a CPU", _first(torch.device("cpu"), None)[0]),
        ("auto on a GPU", _automatic_on_gpu()),
        ("override", _override),
        ("threads", str(torch.get_num_threads())),
        ("built against torch", str(facts.get("torch", "not built"))),
    ]
    # The operator library's own failure is in the line of its backend.
    others = {name: reason for name, reason in facts.get("failures", {}).items() if name != "vqkernels._ops"}
    lines += [(f"build of {name}", f"failed: {reason}") for name, reason in others.items()]
    return lines


def _triton_report() -> list[tuple[str, str]]:
    """The backend, and what is known of each GPU."""
    gpus = proof.visible()
    problems = {proof.state("triton", one.number)[0] for one in gpus} or {proof.state("triton", 0)[0]}
    if "" not in problems:
        return [("backend triton", f"unavailable: {'; '.join(sorted(problems))}")]
    lines = [("backend triton", f"{triton.built_by()}, kernels {triton.source_hash()}")]
    for one in gpus:
        served = not proof.state("triton", one.number)[0]
        told = _proof("triton", one, "not verified: ") if served else f"not served: {triton.needs()}"
        lines.append((f"GPU {one.number}", f"{one.name}, sm_{one.capability[0]}{one.capability[1]}, {told}"))
    return lines


def _cuda_report() -> list[tuple[str, str]]:
    """The CUDA kernels: what they were built for, and on which GPU they were ever proved."""
    if problem := cuda.problem():
        return [("backend cuda", f"unavailable: {problem}")]
    built = f"{cuda.compiler()} for {', '.join(cuda.architectures())}; {', '.join(operators('cuda'))}"
    lines = [("backend cuda", f"{built}; kernels {cuda.source_hash()}")]
    for one in proof.visible():
        told = proof.state("cuda", one.number)[0] or _proof("cuda", one, "not verified: auto does not take it; ")
        lines.append((f"cuda on GPU {one.number}", told))
    if len(lines) == 1:
        command = BACKENDS["cuda"].proof
        lines.append(("cuda on a GPU", f"never proved on a GPU: auto does not take it before `{command}`"))
    return lines


def _proof(backend: str, one: proof.Gpu, otherwise: str) -> str:
    """Which table says that the kernels were verified on a GPU, or what to do."""
    by = verified.where(proof.key(backend, one))
    return f"verified, says {by}" if by else f"{otherwise}run `{BACKENDS[backend].proof}`"


def _automatic_on_gpu() -> str:
    """What "auto" takes on each GPU; one text where they agree."""
    choices = {one.number: _on_gpu(one.number) for one in proof.visible()} or {0: _on_gpu(0)}
    if len(set(choices.values())) == 1:
        return next(iter(choices.values()))
    return "; ".join(f"GPU {number}: {choice}" for number, choice in choices.items())


def _on_gpu(number: int) -> str:
    problem, doubt = proof.state("triton", number)
    if not problem and not doubt:
        return "triton"
    serving = "eager" if any(proof.state("cuda", number)) else "cuda, and eager where it has no kernel"
    return f"{serving}: {problem or doubt}"
