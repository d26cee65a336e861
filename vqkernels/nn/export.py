"""Plain PyTorch in place of the library's operators, for programs that must run without it.

`torch.onnx.export` needs nothing of this: it is given plain PyTorch by itself, whether `dynamo=True` or `dynamo=False`;
the latter passes keyword-only arguments by position, so that it takes a model around a layer, but no layer alone.
A program of `torch.export` holds the operators of the library; this takes them out, for ONNX or another engine:

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
