"""The table of backends and operators: it says what torch's dispatcher really holds."""

import importlib

import pytest
import torch

import vqkernels.ops.pixelcnn_head
import vqkernels.ops.pixelcnn_layer
import vqkernels.ops.pixelcnn_step  # noqa: F401  # with it every operator is registered
from vqkernels.backends import cpu
from vqkernels.backends.table import BACKENDS, COMPOSED, EXPORTED, LIBRARY, OPERATORS, function, serves

ROWS = [(operator, backend) for operator, row in OPERATORS.items() for backend in row]


@pytest.mark.parametrize(("operator", "backend"), ROWS)
def test_what_the_table_names_is_registered(operator, backend):
    if OPERATORS[operator][backend] == LIBRARY and cpu.load() is not None:
        pytest.skip("the C++ kernels are absent")
    name = ".".join(filter(None, (f"vqkernels::{operator}", BACKENDS[backend].overload)))
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, BACKENDS[backend].key)


def test_the_library_has_no_operator_that_the_table_lacks(cpu_kernels):
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vqkernels::")}
    held = {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")}
    assert {name.partition("::")[2] for name in held} == {one for one, row in OPERATORS.items() if "cpu" in row}


def test_every_function_is_where_the_table_says():
    entries = {e for row in OPERATORS.values() for e in row.values()} - {LIBRARY, COMPOSED, *BACKENDS}
    for entry in sorted({*entries, *EXPORTED.values()}):
        module, _, name = entry.partition(":")
        if not module.startswith("triton."):  # its kernels need Triton: tests/backends/triton
            assert callable(getattr(importlib.import_module(f"vqkernels.backends.{module}"), name)), entry


def test_eager_computes_everything_and_who_has_no_kernel_is_not_asked():
    assert all("eager" in row for row in OPERATORS.values())
    assert serves("triton", "entropy") and not serves("cuda", "entropy")
    assert serves("triton", None) and not serves("cuda", None)
    assert function("sample", "cuda") is not None and function("sample", "cpu") is None
