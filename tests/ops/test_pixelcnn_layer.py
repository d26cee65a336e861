"""The fused passes of a PixelCNN layer: every SIMD level against plain PyTorch, Winograd's filter against conv2d."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from vqkernels.backends import cpu
from vqkernels.backends.eager import pixelcnn_layer as eager
from vqkernels.ops import pixelcnn_layer as ops

SHAPES = [(1, 1, 1, 1), (2, 3, 4, 8), (3, 2, 7, 19), (1, 5, 3, 16), (2, 4, 9, 64), (1, 1, 12, 33), (0, 3, 4, 8)]
LEVELS = ["baseline", "avx2", "avx512", "vnni"]


def at_level(monkeypatch, level: str) -> None:
    if level not in cpu.simd_levels():
        pytest.skip(f"this CPU has no {level}")
    monkeypatch.setenv("VQKERNELS_SIMD", level)


def near(found, expected, dtype: torch.dtype) -> None:
    """Within some roundings of the largest element."""
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        scale = float(y.abs().max()) if y.numel() else 0.0
        torch.testing.assert_close(x, y, rtol=0, atol=60 * torch.finfo(dtype).eps * max(scale, 1.0))


def shifts(batch: int, positions: int, channels: int, dtype: torch.dtype):
    for rows in {batch, batch * positions}:
        yield torch.randn(rows, 2 * channels, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", LEVELS)
def test_every_simd_level_computes_the_vertical_passes(monkeypatch, cpu_kernels, level, dtype):
    at_level(monkeypatch, level)
    for batch, height, width, channels in SHAPES:
        grid, rows = [batch, height, width], batch * height * width
        products = torch.randn(6, batch * height * eager.tiles_of(width), 2 * channels, dtype=dtype)
        above, grad = (torch.randn(rows, 2 * channels, dtype=dtype) for _ in range(2))
        for shift in shifts(batch, height * width, channels, dtype):
            for transformed, x in ((True, products), (False, above)):
                for last in (False, True):
                    arguments = (x, shift, grid, transformed, last)
                    near(ops.vertical("cpu", *arguments), eager.vertical(*arguments), dtype)
                    given = products[:, :0] if last else torch.randn_like(products)
                    arguments = (grad, given, above, shift, grid, transformed)
                    near(ops.vertical_backward("cpu", *arguments), eager.vertical_backward(*arguments), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", LEVELS)
def test_every_simd_level_computes_the_horizontal_passes(monkeypatch, cpu_kernels, level, dtype):
    at_level(monkeypatch, level)
    for batch, height, width, channels in SHAPES:
        grid, rows = [batch, height, width], batch * height * width
        left, grad_pairs = (torch.randn(rows, 2 * channels, dtype=dtype) for _ in range(2))
        grad, update, residual = (torch.randn(rows, channels, dtype=dtype) for _ in range(3))
        scale, bias = torch.rand(rows, channels, dtype=dtype), torch.randn(channels, dtype=dtype)
        for shift in shifts(batch, height * width, channels, dtype):
            for mask in (None, scale):
                near(ops.gate("cpu", left, shift, mask, grid), eager.gate(left, shift, mask, grid), dtype)
                arguments = (grad, left, shift, mask, grid)
                near(ops.gate_backward("cpu", *arguments), eager.gate_backward(*arguments), dtype)
        for before in (None, residual):
            for last in (False, True):
                arguments = (update, bias, before, grid, last)
                near(ops.join("cpu", *arguments), eager.join(*arguments), dtype)
        for pairs in (grad_pairs, grad_pairs[:0]):
            arguments = (pairs, grad, grid)
            near(ops.join_backward("cpu", *arguments), eager.join_backward(*arguments), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", LEVELS)
def test_every_simd_level_transforms_filters(monkeypatch, cpu_kernels, level, dtype):
    at_level(monkeypatch, level)
    for outputs, channels in ((1, 1), (6, 3), (38, 19), (128, 64)):
        weight = torch.randn(outputs, channels, 2, 3, dtype=dtype)
        near(ops.filters("cpu", weight), eager.filters(weight), dtype)
        near(ops.filters("cpu", weight.transpose(0, 1)), eager.filters(weight.transpose(0, 1)), dtype)
        grad = torch.randn(6, outputs, 2 * channels, dtype=dtype)
        near(ops.filters_backward("cpu", grad), eager.filters_backward(grad), dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kernel", [(3, 7, 3, 3), (1, 3, 0, 3), (1, 3, 1, 1), (2, 2, 0, 0)])
def test_every_simd_level_looks_up_taps(monkeypatch, cpu_kernels, level, kernel):
    at_level(monkeypatch, level)
    for (batch, height, width, channels), dtype in zip(SHAPES, [torch.float32, torch.float64] * 4, strict=False):
        codes = torch.randint(5, (batch, height, width))
        table = torch.randn(5, kernel[0] * kernel[1], channels, dtype=dtype)
        near(ops.taps("cpu", codes, table, list(kernel)), eager.taps(codes, table, list(kernel)), dtype)
        grad = torch.randn(codes.numel(), channels, dtype=dtype)
        arguments = (grad, codes, 5, list(kernel))
        near(ops.taps_backward("cpu", *arguments), eager.taps_backward(*arguments), dtype)


@pytest.mark.parametrize("width", range(1, 10))
def test_tiles_times_filters_are_the_convolution(width, backend):
    """2 x 3 taps: the row above and the own row; nothing outside the grid."""
    batch, height, channels = 2, 3, 5
    grid, rows = [batch, height, width], batch * height * width
    before, none = torch.randn(rows, 2 * channels, dtype=torch.float64), torch.zeros(batch, 2 * channels).double()
    weight = torch.randn(2 * channels, channels, 2, 3, dtype=torch.float64)
    _, tiles = ops.vertical(backend, before, none, grid, False, False)
    found, _ = ops.vertical(backend, torch.bmm(tiles, ops.filters(backend, weight).mT), none, grid, True, True)
    content, share = before.chunk(2, dim=1)
    features = (content.tanh() * share.sigmoid()).view(batch, height, width, channels).permute(0, 3, 1, 2)
    expected = F.conv2d(F.pad(features, (1, 1, 1, 0)), weight).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_taps_are_the_convolution_of_an_embedding(backend):
    codes, embedding = torch.randint(6, (2, 4, 5)), torch.randn(6, 3, dtype=torch.float64)
    weight = torch.randn(7, 3, 2, 5, dtype=torch.float64)
    table = torch.einsum("kc,ncrw->krwn", embedding, weight).flatten(1, 2).contiguous()
    found = ops.look_up_taps(codes, table, (2, 5, 2, 2), backend)
    embedded = F.pad(embedding[codes].permute(0, 3, 1, 2), (2, 2, 2, -1))
    torch.testing.assert_close(found, F.conv2d(embedded, weight).permute(0, 2, 3, 1).flatten(0, 2), rtol=0, atol=1e-12)
    with pytest.raises((RuntimeError, IndexError), match="codes must be in|out of (range|bounds)"):
        ops.look_up_taps(codes + 6, table, (2, 5, 2, 2), backend)


@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1e-6, 1.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gate_and_its_slopes_at_every_magnitude(cpu_kernels, dtype, magnitude):
    left = ((torch.rand(40, 100, dtype=torch.float64) - 0.5) * 2 * magnitude).to(dtype)
    grad, none, grid = torch.ones(40, 50, dtype=dtype), torch.zeros(1, 100, dtype=dtype), [1, 5, 8]
    exact = left.double().requires_grad_()
    content, share = exact.chunk(2, dim=1)
    gated = content.tanh() * share.sigmoid()
    gated.sum().backward()
    found_grad, _, again = ops.gate_backward("cpu", grad, left, none, None, grid)
    bound = 6 * torch.finfo(dtype).eps
    assert exact.grad is not None
    for found, expected in (
        (ops.gate("cpu", left, none, None, grid), gated),
        (again, gated),
        (found_grad, exact.grad),
    ):
        assert float((found.double() - expected).detach().abs().max()) <= bound


def test_a_nan_stays_in_its_position(cpu_kernels):
    left, grid = torch.randn(6, 16), [1, 2, 3]
    left[3, 1] = float("nan")
    gated = ops.gate("cpu", left, torch.zeros(1, 16), None, grid)
    assert gated[3, 1].isnan() and int(gated.isnan().sum()) == 1


def layer_inputs(batch: int = 3, height: int = 4, width: int = 5, channels: int = 6) -> list[torch.Tensor]:
    rows, count = batch * height * width, batch * height * eager.tiles_of(width)
    shapes = [(6, count, 2 * channels), (rows, 2 * channels), (rows, channels), (batch, 2 * channels)]
    shapes += [(batch, 2 * channels), (2 * channels, channels, 2, 3), (2 * channels, 2 * channels)]
    shapes += [(2 * channels, 2 * channels), (channels, channels), (channels,), (rows, channels)]
    return [torch.randn(shape, dtype=torch.float64) / 3 for shape in shapes]


def run_layer(inputs: list[torch.Tensor], backend: str, last: bool = False):
    tiles, pairs, features, vertical, horizontal, *matrices = inputs
    grid = (3, 4, 5)
    return ops.gated_layer(tiles, pairs, features, (vertical, horizontal), *matrices, grid, last=last, backend=backend)


def test_gradcheck(backend):
    inputs = layer_inputs()
    wanted = [x.requires_grad_() for x in inputs[:-1]]
    scale = inputs[-1]
    assert torch.autograd.gradcheck(lambda *x: run_layer([*x, scale], backend), wanted, fast_mode=True)
    *start, _ = layer_inputs()
    above, beside = (torch.randn(60, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    others = [x.requires_grad_() for x in (start[3], start[4], start[6], start[8], start[9])]

    def first(above, beside, vertical, horizontal, across, output, bias):
        shifts = (vertical, horizontal)
        return ops.start_layer(
            above, beside, shifts, across, output, bias, scale, (3, 4, 5), last=False, backend=backend
        )

    assert torch.autograd.gradcheck(first, [above, beside, *others], fast_mode=True)


@pytest.mark.parametrize("wanted", range(10))
def test_a_gradient_alone_is_that_of_all_together(wanted, cpu_kernels):
    inputs = layer_inputs()
    weights = [torch.randn_like(x) for x in run_layer(inputs, "cpu")]
    found = []
    for chosen in (range(10), [wanted]):
        leaves = [x.clone().requires_grad_(number in chosen) for number, x in enumerate(inputs[:-1])]
        results = run_layer([*leaves, inputs[-1]], "cpu")
        torch.autograd.backward(results, weights)
        assert [x.grad is not None for x in leaves] == [number in chosen for number in range(10)]
        found.append(leaves[wanted].grad)
    assert torch.equal(*found)


def test_a_second_derivative_is_refused(cpu_kernels):
    inputs = layer_inputs()
    inputs[0].requires_grad_()
    codes, table = torch.randint(4, (2, 3, 3)), torch.randn(4, 3, 5, requires_grad=True)
    sums = [(inputs[0], sum(x.square().sum() for x in run_layer(inputs, "cpu")))]
    sums += [(table, ops.look_up_taps(codes, table, (1, 3, 0, 3), "cpu").square().sum())]
    for leaf, result in sums:
        (grad,) = torch.autograd.grad(result, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="does not support double backward"):
            grad.sum().backward()


def test_threads_change_no_bit_of_a_pass(cpu_kernels, threads):
    grid, channels = [7, 6, 9], 21
    products, shift = torch.randn(6, 7 * 6 * 3, 2 * channels), torch.randn(7, 2 * channels)
    left, grad = torch.randn(7 * 54, 2 * channels), torch.randn(7 * 54, channels)
    codes, table = torch.randint(9, (7, 6, 9)), torch.randn(9, 21, channels)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append([
            *ops.vertical("cpu", products, shift, grid, True, False),
            *ops.vertical_backward("cpu", left, products, left, shift, grid, True),
            *ops.gate_backward("cpu", grad, left, shift, None, grid),
            *ops.join("cpu", grad, grad[0], grad, grid, False),
            ops.join_backward("cpu", left, grad, grid),
            ops.taps("cpu", codes, table, [3, 7, 3, 3]),
            ops.taps_backward("cpu", grad, codes, 9, [3, 7, 3, 3]),
        ])  # fmt: skip
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ["cpu", "eager"])
def test_opcheck(cpu_kernels, name):
    grid, rows, channels = [2, 3, 5], 30, 4
    products, left = torch.randn(6, 12, 2 * channels), torch.randn(rows, 2 * channels)
    grad, shift, bias = torch.randn(rows, channels), torch.randn(2, 2 * channels), torch.randn(channels)
    codes, table = torch.randint(9, (2, 3, 5)), torch.randn(9, 6, channels)
    for operation, arguments in (
        (ops.vertical, (products, shift, grid, True, False)),
        (ops.vertical, (left, shift, grid, False, True)),
        (ops.vertical_backward, (left, products, left, shift, grid, True)),
        (ops.vertical_backward, (left, products, left, shift, grid, False)),
        (ops.gate, (left, shift, None, grid)),
        (ops.gate_backward, (grad, left, shift, grad, grid)),
        (ops.join, (grad, bias, grad, grid, False)),
        (ops.join, (grad, bias, None, grid, True)),
        (ops.join_backward, (left, grad, grid)),
        (ops.filters, (torch.randn(8, 4, 2, 3),)),
        (ops.filters_backward, (torch.randn(6, 8, 8),)),
        (ops.taps, (codes, table, [2, 3, 2, 1])),
        (ops.taps_backward, (grad, codes, 9, [2, 3, 2, 1])),
    ):
        opcheck(operation.overloads[name], arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.gate("cpu", x, x[:3], None, [2, 2, 2]), "shift must have a row for each grid"),
        (lambda x: ops.gate("cpu", x, x[:2], None, [2, 2, 3]), "left must have 96 elements, got 64"),
        (lambda x: ops.gate("cpu", x.half(), x[:2].half(), None, [2, 2, 2]), "expected float32 or float64"),
        (lambda x: ops.gate("cpu", x, x[:2].double(), None, [2, 2, 2]), "of the same dtype"),
        (lambda x: ops.vertical("cpu", x, x[:2], [2, 2, 2], True, False), "x has a wrong number of dimensions"),
        (lambda x: ops.join("cpu", x, x[0, :3], None, [2, 2, 2], False), "bias must have 8 elements"),
    ],
)
def test_mistakes_are_named(cpu_kernels, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(8, 8))
