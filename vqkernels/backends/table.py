"""Who computes: every backend, every operator, and the function that computes the operator in the backend.

This is the one place. Operators are registered from it (`vqkernels.ops.registration`), a backend is chosen from it
(`registry`), and `vqkernels verify` and `vqkernels info` read it. A function is imported by its first call.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from . import canonical


class Backend(NamedTuple):
    """How a backend appears to torch and to a user.

    The first backend of a device has the plain name `vqkernels::X` of each operator, under the device's dispatch key:
    a traced or saved graph then serves every device. Each other backend has an overload with its own name.
    """

    device: str | None  # the type of the tensors that it computes; None: any
    title: str
    overload: str = ""  # "eager": `vqkernels::X.eager`
    key: str = "CompositeExplicitAutograd"  # of torch's dispatcher
    canonical: bool = False  # its functions take canonical views, and `canonical` makes them
    proof: str | None = None  # the command that must prove it on a kind of GPU before "auto" takes it there


# Best first: "auto" takes the first that is available and proved.
BACKENDS = {
    "cpu": Backend("cpu", "C++ kernels", key="CPU"),
    "triton": Backend("cuda", "Triton kernels", key="CUDA", canonical=True, proof="vqkernels verify"),
    "cuda": Backend("cuda", "CUDA kernels", "cuda", canonical=True, proof="vqkernels verify --backend cuda"),
    "eager": Backend(None, "PyTorch operations", "eager"),
}

LIBRARY = "the operator library"  # registers the function itself when it is loaded
COMPOSED = "vqkernels.ops"  # built there from other operators, which are called with the same backend

# operator -> backend -> "module:function" of this package, LIBRARY, COMPOSED, or a backend whose function serves
OPERATORS: dict[str, dict[str, str]] = {
    "nearest": {
        "cpu": LIBRARY,
        "triton": "triton.nearest:nearest",
        "cuda": "cuda.nearest:nearest",
        "eager": "eager.quantize:nearest",
    },
    "quantize": {
        "cpu": LIBRARY,
        "triton": "triton.quantize:quantize",
        "cuda": "cuda.nearest:quantize",
        "eager": "eager.quantize:quantize",
    },
    "lookup": {
        "cpu": LIBRARY,
        "triton": "triton.quantize:lookup",
        "cuda": "cuda.nearest:lookup",
        "eager": "eager.quantize:lookup",
    },
    "quantize_backward": {
        "cpu": LIBRARY,
        "triton": "triton.quantize:quantize_backward",
        "cuda": "cuda.backward:quantize_backward",
        "eager": "eager.quantize:quantize_backward",
    },
    "statistics": {
        "cpu": LIBRARY,
        "triton": "triton.statistics:statistics",
        "cuda": "cuda.statistics:statistics",
        "eager": "eager.quantize:statistics",
    },
    "sample": {"cpu": LIBRARY, "triton": "eager", "cuda": "eager", "eager": "eager.sample:sample"},
    "kmeans_init": {"cpu": COMPOSED, "triton": COMPOSED, "cuda": COMPOSED, "eager": COMPOSED},
    "entropy": {"cpu": LIBRARY, "triton": "triton.entropy:entropy", "eager": "eager.entropy:entropy"},
    "entropy_backward": {
        "cpu": LIBRARY,
        "triton": "triton.entropy:entropy_backward",
        "eager": "eager.entropy:entropy_backward",
    },
    "residual_quantize": {
        "cpu": LIBRARY,
        "triton": "triton.residual:residual_quantize",
        "eager": "eager.residual:residual_quantize",
    },
    "residual_quantize_backward": {
        "cpu": LIBRARY,
        "triton": "triton.residual:residual_quantize_backward",
        "eager": "eager.residual:residual_quantize_backward",
    },
    "pixelcnn_step": {"cpu": LIBRARY, "triton": "eager", "cuda": "eager", "eager": "eager.pixelcnn_step:pixelcnn_step"},
    **{
        f"pixelcnn_{function}": {"cpu": LIBRARY, "eager": f"eager.{module}:{function}"}
        for module, functions in {
            "pixelcnn_layer": ("vertical", "gate", "join", "filters", "taps"),
            "pixelcnn_head": ("rectify", "planes"),
        }.items()
        for function in (*functions, *(f"{one}_backward" for one in functions))
    },
    # what a compiler must see as one operator, on any device
    "snapshot": {"eager": COMPOSED},
    "enter": {"eager": COMPOSED},
}

# What an exporter for ONNX or another engine gets in place of an operator of a layer in eval mode.
EXPORTED = {name: f"plain:{name}" for name in ("nearest", "quantize", "residual_quantize")}


@functools.cache
def serves(backend: str, operator: str | None) -> bool:
    """Whether a backend computes an operator; of None, whether it has all that the best backend of its device has."""
    if operator is not None:
        return backend in OPERATORS[operator]
    best = next(name for name, one in BACKENDS.items() if one.device == BACKENDS[backend].device)
    return all(backend in row for row in OPERATORS.values() if best in row)


def operators(backend: str) -> list[str]:
    """What a backend computes, sorted by name."""
    return sorted(operator for operator, row in OPERATORS.items() if backend in row)


def function(operator: str, backend: str) -> Callable[..., Any] | None:
    """What computes an operator in a backend, with the arguments of its schema; None for LIBRARY and COMPOSED."""
    entry = OPERATORS[operator][backend]
    if entry in BACKENDS:
        return function(operator, entry)
    if entry in (LIBRARY, COMPOSED):
        return None
    found = imported(entry)
    return partial(getattr(canonical, operator), found) if BACKENDS[backend].canonical else found


def functions(backend: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The operators that a backend's own Python functions compute, each with its function."""
    for operator in operators(backend):
        if OPERATORS[operator][backend] not in BACKENDS and (found := function(operator, backend)):
            yield operator, found


def register(backend: str, namespace: str, key: str) -> torch.library.Library:
    """Put a backend's functions under the plain names of a namespace and a dispatch key; keep what is returned alive.

    For a rehearsal on a CPU of what serves a GPU.
    """
    library = torch.library.Library(namespace, "IMPL")
    for operator, found in functions(backend):
        library.impl(operator, found, key)
    return library


def imported(entry: str) -> Callable[..., Any]:
    """A function that imports "module:function" when it is called."""
    return partial(_call, entry)


def _call(entry: str, *arguments: Any, **named: Any) -> Any:
    return _found(entry)(*arguments, **named)


@functools.cache
def _found(entry: str) -> Callable[..., Any]:
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)
