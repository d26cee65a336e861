"""Offers the kernels to torch's dispatcher. Needs no Triton: a kernel's module is imported by its first call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

# operator -> module of this package that has a function of the same name and arguments
OPERATORS = {"nearest": "nearest", "quantize": "quantize", "quantize_backward": "quantize", "statistics": "statistics"}


def register(namespace: str = "vqkernels", key: str = "CUDA") -> torch.library.Library:
    """Implement the operators of `namespace` for one dispatch key; keep the returned library alive."""
    library = torch.library.Library(namespace, "IMPL")
    for operator, module in OPERATORS.items():
        library.impl(operator, _deferred(operator, module), key)
    return library


def _deferred(operator: str, module: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{__package__}.{module}"), operator)(*arguments)

    return call
