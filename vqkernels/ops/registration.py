"""Registers the operators of the library with torch: schema, fake kernel, and what the table of backends says.

Every operation `X` becomes `vqkernels::X`, which the best kernels of each device implement, and an overload for each
other backend that computes it, such as `vqkernels::X.eager`. A graph therefore shows which backend was chosen.
TorchScript forgets overloads when it saves: what a layer in eval mode runs has each of them under another name as well,
`vqkernels::X_eager`, which a traced graph holds.

An ONNX exporter gets neither: it is given the operation in plain PyTorch.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..backends.table import BACKENDS, EXPORTED, OPERATORS, function, imported

_library = torch.library.Library("vqkernels", "DEF")
PLAIN: dict[
    torch._ops.OpOverload, Callable[..., Any]
] = {}  # what each operator of a layer in eval mode decomposes into


class Operation:
    """One operation: call it with the name of a backend, then the arguments of its schema."""

    def __init__(
        self, name: str, arguments: str, fake: Callable[..., Any], composed: Callable[..., Any] | None = None
    ) -> None:
        """`composed` takes a backend and the arguments: for an operation that the table calls COMPOSED."""
        self._name, self._traced = name, {}
        self._plain = imported(EXPORTED[name]) if name in EXPORTED else None
        default = _define(name, arguments, fake)
        self.overloads = {}
        for backend in OPERATORS[name]:
            label = BACKENDS[backend].overload
            self.overloads[backend] = _define(f"{name}.{label}", arguments, fake) if label else default
            names = [f"{name}.{label}" if label else name]
            if self._plain and label:
                self._traced[backend] = _define(f"{name}_{label}", arguments, fake)
                names.append(f"{name}_{label}")
            found = function(name, backend) or (partial(composed, backend) if composed else None)
            for one in names if found else ():
                _library.impl(one, found, BACKENDS[backend].key)
        if self._plain:
            PLAIN.update(dict.fromkeys((self.overloads[name] for name in ("cpu", "eager")), self._plain))

    def __call__(self, backend: str, *arguments: Any) -> Any:
        tracing = torch.jit.is_tracing()
        if (tracing or torch.compiler.is_exporting()) and torch.onnx.is_in_onnx_export():
            if self._plain is None:
                raise RuntimeError(f"ONNX has nothing for vqkernels::{self._name}: export the model in eval mode")
            return self._plain(*arguments)
        if tracing and backend in self._traced:
            return self._traced[backend](*arguments)
        if backend not in self.overloads:
            raise RuntimeError(f'backend "{backend}" has no kernel for vqkernels::{self._name}')
        return self.overloads[backend](*arguments)


def _define(name: str, arguments: str, fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """One operator or overload: its schema, its fake kernel, and what it says to torch.vmap."""
    _library.define(f"{name}{arguments}", tags=(torch.Tag.needs_exact_strides,))
    torch.library.register_fake(f"vqkernels::{name}", _outside_onnx(name, fake), lib=_library)
    _library.impl(name, refuse_vmap, "FuncTorchBatched")
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.vqkernels, packet), overload or "default")


def _outside_onnx(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake kernel, which says what to do where an exporter for ONNX meets the operator itself."""

    @functools.wraps(fake)
    def checked(*arguments: Any) -> Any:
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                f"ONNX has nothing for vqkernels::{name}: give torch.onnx.export the model in eval mode, or the "
                "program after .run_decompositions(vqkernels.nn.export.decompositions())"
            )
        return fake(*arguments)

    return checked


def refuse_vmap(*_: Any) -> None:
    """What the operators say to a batch of calls."""
    raise RuntimeError(
        "vqkernels does not support torch.vmap: give the rows of all of them as leading axes of z, and one codebook "
        "for each as codebooks (H, K, D) with z (H, ..., D)"
    )
