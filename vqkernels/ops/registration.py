"""Registers the operators of the library with torch: schema, fake kernel, fallback.

Every operation `X` becomes two overloads: `vqkernels::X`, which the kernels of each device implement, and
`vqkernels::X.eager`, the fallback on any device; a third, `vqkernels::X.cuda`, where there are CUDA C++ kernels. A
graph therefore shows which backend was chosen. TorchScript forgets overloads when it saves: what a layer in eval mode
runs has each of them under a name of its own as well, `vqkernels::X_eager`, which a traced graph holds.

An ONNX exporter gets neither: it is given the operation in plain PyTorch.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..backends.cuda.registration import OPERATORS as CUDA_OPERATORS

_library = torch.library.Library("vqkernels", "DEF")
PLAIN: dict[
    torch._ops.OpOverload, Callable[..., Any]
] = {}  # what each operator of a layer in eval mode decomposes into


class Operation:
    """One operation: call it with the name of a backend, then the arguments of its schema."""

    def __init__(
        self,
        name: str,
        arguments: str,
        fake: Callable[..., Any],
        eager: Callable[..., Any],
        kernel: Callable[..., Any] | None = None,
        cuda: Callable[..., Any] | None = None,
        plain: Callable[..., Any] | None = None,
    ) -> None:
        """`kernel`: `vqkernels::X` on every device, for an operation that is built from other operators' kernels;
        `cuda` the same for `vqkernels::X.cuda`. `plain`: what exporters get, for an operation of layers in eval mode.
        """
        self._plain = plain
        cuda = CUDA_OPERATORS.get(name, cuda)
        self.kernel = _define(name, arguments, fake, kernel)
        self.eager = _define(f"{name}.eager", arguments, fake, eager)
        self.cuda = _define(f"{name}.cuda", arguments, fake, cuda) if cuda else None
        self._traced = {}
        if plain is not None:
            PLAIN.update(dict.fromkeys((self.kernel, self.eager), plain))
            self._traced["eager"] = _define(f"{name}_eager", arguments, fake, eager)
            if cuda:
                self._traced["cuda"] = _define(f"{name}_cuda", arguments, fake, cuda)

    def __call__(self, backend: str, *arguments: Any) -> Any:
        if backend == "cuda" and self.cuda is None:
            raise RuntimeError(f'backend "cuda" has no kernel for {self.kernel}')
        tracing = torch.jit.is_tracing()
        if (tracing or torch.compiler.is_exporting()) and torch.onnx.is_in_onnx_export():
            if self._plain is None:
                raise RuntimeError(f"ONNX has nothing for {self.kernel}: export the model in eval mode")
            return self._plain(*arguments)
        if tracing and backend in self._traced:
            return self._traced[backend](*arguments)
        if backend == "cuda" and self.cuda is not None:
            return self.cuda(*arguments)
        return self.eager(*arguments) if backend == "eager" else self.kernel(*arguments)


def _define(
    name: str, arguments: str, fake: Callable[..., Any], implementation: Callable[..., Any] | None
) -> torch._ops.OpOverload:
    """One operator or overload, on every device where there is an implementation."""
    _library.define(f"{name}{arguments}", tags=(torch.Tag.needs_exact_strides,))
    torch.library.register_fake(f"vqkernels::{name}", _outside_onnx(name, fake), lib=_library)
    if implementation is not None:
        _library.impl(name, implementation, "CompositeExplicitAutograd")
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
