"""Registers the operators of the library with torch: schema, fake kernel, fallback.

Every operation `X` becomes two overloads: `vqkernels::X`, which the kernels of each device implement, and
`vqkernels::X.eager`, the fallback on any device; a third, `vqkernels::X.cuda`, where there are CUDA C++ kernels. A
graph therefore shows which backend was chosen.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..backends.cuda.registration import OPERATORS as CUDA_OPERATORS

_library = torch.library.Library("vqkernels", "DEF")


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
    ) -> None:
        """`kernel`: `vqkernels::X` on every device, for an operation that is built from other operators' kernels;
        `cuda` the same for `vqkernels::X.cuda`."""
        cuda = CUDA_OPERATORS.get(name, cuda)
        for overload in ("", ".eager", *((".cuda",) if cuda else ())):
            _library.define(f"{name}{overload}{arguments}", tags=(torch.Tag.needs_exact_strides,))
            torch.library.register_fake(f"vqkernels::{name}{overload}", fake, lib=_library)
        _library.impl(f"{name}.eager", eager, "CompositeExplicitAutograd")
        if kernel is not None:
            _library.impl(name, kernel, "CompositeExplicitAutograd")
        packet = getattr(torch.ops.vqkernels, name)
        self.kernel = packet.default
        self.eager = packet.eager
        self.cuda = None
        if cuda is not None:
            _library.impl(f"{name}.cuda", cuda, "CompositeExplicitAutograd")
            self.cuda = packet.cuda

    def __call__(self, backend: str, *arguments: Any) -> Any:
        if backend == "cuda":
            if self.cuda is None:
                raise RuntimeError(f'backend "cuda" has no kernel for {self.kernel}')
            return self.cuda(*arguments)
        return self.eager(*arguments) if backend == "eager" else self.kernel(*arguments)
