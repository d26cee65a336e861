"""The kernels behind torch's dispatcher, under a namespace of the test's own, with the package's schemas."""

import pytest
import torch

from vqkernels import reference

pytest.importorskip("triton")

from vqkernels.backends import triton as backend
from vqkernels.backends.triton.registration import OPERATORS, register

NAMESPACE = "vqkernels_triton_test"


@pytest.fixture(scope="module")
def operators():
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.vqkernels, name).default._schema)
        definitions.define(schema.removeprefix("vqkernels::"))
    implementations = register(NAMESPACE, "CUDA" if torch.cuda.is_available() else "CPU")
    yield getattr(torch.ops, NAMESPACE)
    del implementations, definitions


def test_the_operators_of_the_package_are_served(operators, device):
    z, codebook = torch.randn(1, 1, 20, 6, device=device), torch.randn(1, 9, 6, device=device)
    expected = reference.nearest(z[0, 0].cpu(), codebook[0].cpu())
    indices, _ = operators.nearest(z, codebook, None, "euclidean", "exact")
    assert torch.equal(indices[0, 0].cpu(), expected)
    quantized, again, _, counts, sums = operators.quantize(z, codebook, None, "euclidean", "exact", True)
    assert torch.equal(quantized[0, 0], codebook[0][indices[0, 0]])
    assert torch.equal(indices, again)
    counts_again, sums_again = operators.statistics(z, indices, 9, None)
    assert torch.equal(counts, counts_again)
    assert torch.equal(sums, sums_again)
    one = torch.ones((), device=device)
    grad_z, grad_codebook = operators.quantize_backward(torch.zeros_like(z), one, one, z, codebook, indices, True)
    torch.testing.assert_close(grad_z, 2 * (z - quantized) / z.numel())
    torch.testing.assert_close(grad_codebook.sum(1), -grad_z.sum((0, 2)))


def test_the_package_says_what_it_is():
    assert backend.problem() is None
    assert backend.supports((8, 0))
    assert not backend.supports((7, 5))
    assert len(backend.source_hash()) == 16
