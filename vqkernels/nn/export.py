"""Plain PyTorch in place of the library's operators, for programs that must run without it.

`torch.onnx.export` does not need this: the layers give it plain PyTorch, with `dynamo=True` and with `dynamo=False`.
The latter passes keyword-only arguments by position, so it exports a model around a layer, but not a layer alone.
A program of `torch.export` holds the operators of the library; this replaces them, for ONNX or another engine:

    program = torch.export.export(model.eval(), (z,)).run_decompositions(vqkernels.nn.export.decompositions())
    torch.onnx.export(program, dynamo=True).save("model.onnx")

What the operators become, and what that does to the index: `vqkernels.backends.plain`.
"""

from collections.abc import Callable

import torch

from ..ops.registration import PLAIN


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """A table for `ExportedProgram.run_decompositions`: torch's own, and ours for the operators of a layer in eval."""
    return dict(torch.export.default_decompositions()) | PLAIN
