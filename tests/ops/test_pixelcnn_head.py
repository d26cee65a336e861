"""The passes of a PixelCNN's head: every SIMD level against plain PyTorch, gradients, threads."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from vqkernels.backends import cpu
from vqkernels.backends.eager import pixelcnn_head as eager
from vqkernels.ops import pixelcnn_head as ops

SHAPES = [(1, 1, 1, 1), (2, 3, 4, 8), (3, 2, 7, 19), (2, 4, 8, 64), (1, 1, 33, 50), (2, 16, 16, 33), (0, 3, 4, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "vnni"])
def test_every_simd_level_computes_the_passes(monkeypatch, cpu_kernels, level, dtype):
    if level not in cpu.simd_levels():
        pytest.skip(f"this CPU has no {level}")
    monkeypatch.setenv("VQKERNELS_SIMD", level)
    for batch, height, width, channels in SHAPES:
        rows = batch * height * width
        x, grad = (torch.randn(rows, channels, dtype=dtype) for _ in range(2))
        bias, planes = torch.randn(channels, dtype=dtype), torch.randn(batch, channels, height, width, dtype=dtype)
        hidden = eager.rectify(x, bias, batch)
        assert torch.equal(ops.rectify("cpu", x, bias, batch), hidden)
        assert torch.equal(
            ops.planes("cpu", x, bias, [batch, height, width]), eager.planes(x, bias, [batch, height, width])
        )
        for found, expected in (
            (ops.rectify_backward("cpu", grad, hidden, batch), eager.rectify_backward(grad, hidden, batch)),
            (ops.planes_backward("cpu", planes), eager.planes_backward(planes)),
        ):
            assert torch.equal(found[0], expected[0])
            atol = torch.finfo(dtype).eps * height * width * 4
            torch.testing.assert_close(found[1], expected[1], rtol=0, atol=atol)


def head_inputs(batch: int = 2, height: int = 3, width: int = 5) -> list[torch.Tensor]:
    shapes = [(batch * height * width, 6), (17, 6), (17,), (11, 17), (11,)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def test_logits_and_gradients_equal_two_convolutions(backend):
    inputs, grid = head_inputs(), (2, 3, 5)
    leaves = [x.clone().requires_grad_() for x in inputs]
    logits = ops.logits_of_rows(*leaves, grid, backend)
    assert logits.is_contiguous()
    plain = [x.clone().requires_grad_() for x in inputs]
    x = plain[0].view(2, 3, 5, 6).permute(0, 3, 1, 2)
    hidden = F.conv2d(x, plain[1][..., None, None], plain[2]).relu()
    expected = F.conv2d(hidden, plain[3][..., None, None], plain[4])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(logits).transpose(2, 3).contiguous().transpose(2, 3)  # not as the logits lie
    logits.backward(weights)
    expected.backward(weights)
    for ours, theirs in zip(leaves, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wanted", range(5))
def test_a_gradient_alone_is_that_of_all_together(wanted, cpu_kernels):
    inputs, grid, found = head_inputs(), (2, 3, 5), []
    for chosen in (range(5), [wanted]):
        leaves = [x.clone().requires_grad_(number in chosen) for number, x in enumerate(inputs)]
        ops.logits_of_rows(*leaves, grid, "cpu").square().sum().backward()
        assert [x.grad is not None for x in leaves] == [number in chosen for number in range(5)]
        found.append(leaves[wanted].grad)
    assert torch.equal(*found)


def test_a_second_derivative_is_refused(cpu_kernels):
    x, *others = head_inputs()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(ops.logits_of_rows(x, *others, (2, 3, 5), "cpu").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        grad.sum().backward()


def test_threads_change_no_bit_of_a_pass(cpu_kernels, threads):
    x, bias, found = torch.randn(7 * 300, 33), torch.randn(33), []
    for count in (1, 2, 3):
        threads(count)
        planes = ops.planes("cpu", x, bias, [7, 15, 20])
        hidden = ops.rectify("cpu", x, bias, 7)
        found.append([planes, hidden, *ops.planes_backward("cpu", planes), *ops.rectify_backward("cpu", x, hidden, 7)])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ["cpu", "eager"])
def test_opcheck(cpu_kernels, name):
    x, bias = torch.randn(30, 4), torch.randn(4)
    for operation, arguments in (
        (ops.rectify, (x, bias, 2)),
        (ops.rectify_backward, (x, x, 2)),
        (ops.planes, (x, bias, [2, 3, 5])),
        (ops.planes_backward, (torch.randn(2, 4, 3, 5),)),
    ):
        opcheck(operation.overloads[name], arguments, test_utils=("test_schema", "test_faketensor"))
