"""The CUDA backend's search from the operator down, on CPU tensors: the launch is the executor's, all else is real."""

import pytest
import torch
from native import cuda_host
from native.build import compiler

from vqkernels.backends import cpu, table
from vqkernels.backends.cuda import nearest as launching

pytestmark = pytest.mark.skipif(
    compiler() is None or cpu.load() is not None, reason="needs a compiler and the CPU kernels"
)


class Executor:
    """torch.ops.vqkernels.cuda_nearest*, block by block."""

    def cuda_nearest_workspace(self, z, codebook, mask, metric, precision, processors):
        problem = cuda_host.problem_of(z, codebook, mask, metric, precision != "fast")
        return cuda_host.workspace_bytes(problem, processors)

    def cuda_nearest(
        self, z, codebook, mask, metric, precision, indices, decided, quantized, squared_error, workspace, processors, _
    ):
        assert workspace.numel() == self.cuda_nearest_workspace(z, codebook, mask, metric, precision, processors)
        found = cuda_host.nearest(
            z, codebook, mask, metric=metric, certified=precision != "fast", quantize=quantized is not None,
            processors=processors,
        )  # fmt: skip
        indices.copy_(found.indices)
        decided.fill_(found.decided)
        if quantized is not None:
            quantized.copy_(found.quantized)
            squared_error.fill_(found.squared_error)
        return found.launches


@pytest.fixture(autouse=True)
def executed(monkeypatch):
    monkeypatch.setattr(launching, "_operators", Executor)


CALLS = {
    "rows": ((7, 12), -1, False),
    "images": ((2, 12, 3, 5), 1, False),
    "heads": ((3, 4, 12), 2, True),
    "heads of images": ((2, 3, 12, 4), 2, True),
    "one row": ((12,), 0, False),
    "interleaved axes": ((2, 3, 12, 4), 2, False),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_operators_are_those_of_the_cpu(name):
    shape, channel_dim, batched = CALLS[name]
    g = torch.Generator().manual_seed(4)
    z = torch.randn(shape, generator=g)
    if name == "interleaved axes":
        z = torch.randn(4, 3, 2, 12, generator=g).permute(2, 1, 3, 0)
    channel_dim %= z.dim()
    codebook = torch.randn(shape[0], 20, 12, generator=g) if batched else torch.randn(20, 12, generator=g)
    mask = torch.rand(z.movedim(channel_dim, -1).shape[:-1], generator=g) > 0.3
    for given, metric, precision in ((None, "euclidean", "exact"), (mask, "dot", "fast")):
        operands = z, codebook, given, channel_dim, metric, precision
        expected = torch.ops.vqkernels.quantize(*operands, False)
        found = table.function("quantize", "cuda")(*operands, False)
        assert torch.equal(found[0], expected[0]) and found[0].stride() == expected[0].stride()
        assert torch.equal(found[1], expected[1]) and found[1].is_contiguous()
        assert float(found[2]) == pytest.approx(float(expected[2]), rel=1e-6)
        assert [x.shape for x in found[3:]] == [x.shape for x in expected[3:]]
        assert [x.dtype for x in found] == [x.dtype for x in expected]
    indices, decided = table.function("nearest", "cuda")(*operands)
    assert torch.equal(indices, expected[1])
    assert decided.shape == () and 0 <= int(decided) <= indices.numel()


def test_what_is_too_large_is_refused_in_a_sentence():
    wide = torch.zeros(1).expand(1, 1, 2, 9000), torch.zeros(1).expand(1, 3, 9000)
    with pytest.raises(RuntimeError, match="up to 8192 channels, got 9000"):
        launching.nearest(*wide, None, "euclidean", "exact")
    heads = torch.zeros(1).expand(1, 2**16, 2, 4), torch.zeros(1).expand(2**16, 3, 4)
    with pytest.raises(RuntimeError, match="up to 65535 heads, got 65536"):
        launching.nearest(*heads, None, "euclidean", "exact")
    many = torch.zeros(1).expand(1, 1, 2, 4), torch.zeros(1).expand(1, 2**30 + 1, 4)
    with pytest.raises(
        RuntimeError, match=r"up to 1073741824 rows and codes per head, got 2 rows and 1073741825 codes"
    ):
        launching.nearest(*many, None, "euclidean", "exact")
