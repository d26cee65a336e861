"""The fused step of the cached PixelCNN: SIMD levels, threads, draws against their rule, memory, and bad input."""

import resource

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqkernels.backends import cpu, drawing
from vqkernels.models import PixelCNN
from vqkernels.models.pixelcnn_sampling import CachedSampler, Options, PackedPixelCNN
from vqkernels.ops.pixelcnn_step import PixelCNNSizes, advance, pack, packed_elements

EVERYTHING = Options(1.0, 0, 1.0, 1.0)


def model(dtype: torch.dtype = torch.float64, **options) -> PixelCNN:
    torch.manual_seed(0)
    made = PixelCNN(50, **{"hidden_channels": 19, "num_layers": 3, "head_channels": 70, **options}).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
    return made


def sampler(
    made: PixelCNN, batch: int, side: int = 4, options: Options = EVERYTHING, backend: str = "cpu"
) -> CachedSampler:
    noise = torch.rand(batch, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    codes = torch.full((batch, side, side), -1)
    return CachedSampler(PackedPixelCNN(made), codes, noise, None, None, options, backend=backend)


def all_logits(one: CachedSampler) -> torch.Tensor:
    """(positions, R, K), a call for each position."""
    _, height, width = one.codes.shape
    logits = one.cache.new_empty(height * width, one.rows, one.packed.sizes.num_codes)
    for position in range(height * width):
        one.advance(position, position + 1, logits[position : position + 1])
    return logits


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "vnni"])
def test_every_simd_level_gives_the_eager_logits(monkeypatch, cpu_kernels, level, dtype, tolerance):
    if level not in cpu.simd_levels():
        pytest.skip(f"this CPU has no {level}")
    monkeypatch.setenv("VQKERNELS_SIMD", level)
    for batch in (1, 2, 5, 6, 7, 12, 13):
        fused, plain = sampler(model(dtype), batch), sampler(model(dtype), batch, backend="eager")
        expected = all_logits(plain)
        scale = float(expected.abs().max())
        torch.testing.assert_close(all_logits(fused), expected, rtol=0, atol=tolerance * scale)
        assert torch.equal(fused.codes, plain.codes)


@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1e-6, 1.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gate_at_every_magnitude(cpu_kernels, dtype, magnitude):
    """Biases alone drive the gates: the last layer's output is tanh(a) sigmoid(b), seen through an identity head."""
    made = model(dtype, num_layers=1, hidden_channels=50, head_channels=50, head_activation=False)
    a = (torch.rand(50, dtype=dtype) - 0.5) * 2 * magnitude
    b = (torch.rand(50, dtype=dtype) - 0.5) * 2 * magnitude
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.layers[0].horizontal.bias.copy_(torch.cat([a, b]))
        made.layers[0].output.weight.copy_(torch.eye(50)[:, :, None, None])
        made.layers[0].output.bias.fill_(1.0)  # above 0 for the head's ReLU
        made.head[1].weight.copy_(torch.eye(50)[:, :, None, None])
        made.head[3].weight.copy_(torch.eye(50)[:, :, None, None])
    found = all_logits(sampler(made, 1, 1))[0, 0]
    expected = 1 + a.double().tanh() * b.double().sigmoid()
    epsilon = torch.finfo(dtype).eps
    assert float((found.double() - expected).abs().max()) <= 4 * epsilon


def test_a_row_at_once_is_its_positions_one_by_one(backend):
    whole, single = (sampler(model(), 5, backend=backend) for _ in range(2))
    whole.advance(0, 6)
    whole.advance(6, 16)
    all_logits(single)
    assert torch.equal(whole.codes, single.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_and_neighbours_change_no_bit(cpu_kernels, threads, dtype):
    made = model(dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        one = sampler(made, 13)
        results.append((all_logits(one), one.codes))
    for logits, codes in results[1:]:
        assert torch.equal(logits, results[0][0]) and torch.equal(codes, results[0][1])
    alone = sampler(made, 13)
    part = CachedSampler(
        alone.packed, alone.codes[4:7].clone(), alone.noise[4:7], None, None, EVERYTHING, backend="cpu"
    )
    assert torch.equal(all_logits(part), results[0][0][:, 4:7])


@pytest.mark.parametrize("top_k,top_p", [(0, 1.0), (1, 1.0), (4, 1.0), (0, 0.4), (7, 0.7), (0, 1e-12), (50, 0.999999)])
@pytest.mark.parametrize("temperature", [1e-30, 0.2, 1.0, 1e30])
def test_draws_follow_the_rule(cpu_kernels, temperature, top_k, top_p):
    """The C++ draw against `drawing.draw_codes`, at u from 0 to just below 1, for logits with ties and extremes."""
    u = torch.tensor([0.0, 1e-300, 0.1, 0.25, 0.5, 0.75, 0.999, 1 - 2.0**-53], dtype=torch.float64)
    spread = torch.randn(50, dtype=torch.float64) * 3
    cases = {
        "ordinary": spread,
        "equal": torch.zeros(50, dtype=torch.float64),
        "in steps": torch.arange(50, dtype=torch.float64).div(10, rounding_mode="floor"),
        "one": torch.where(torch.arange(50) == 17, 1e4, spread),
        "some impossible": torch.where(torch.arange(50) % 3 == 0, -torch.inf, spread),
        "first impossible": torch.where(torch.arange(50) < 40, -torch.inf, spread),
        "NaN": torch.where(torch.arange(50) == 30, torch.nan, spread),
        "infinite": torch.where(torch.arange(50) == 30, torch.inf, spread),
    }
    for name, logits in cases.items():
        made = model()
        with torch.no_grad():
            made.head[3].weight.zero_()
            made.head[3].bias.copy_(logits)
        one = sampler(made, len(u), 1, Options(temperature, top_k, top_p, 1.0))
        one.noise.copy_(u[:, None, None])
        one.advance(0, 1)
        expected = drawing.draw_codes(logits.expand(len(u), -1), u, temperature, top_k, top_p)
        assert torch.equal(one.codes.flatten(), expected), name


def test_draws_have_the_right_frequencies():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).log_softmax(0)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    found = torch.bincount(drawing.draw_codes(logits.expand(len(u), -1), u, 1.0, 0, 1.0), minlength=4) / len(u)
    torch.testing.assert_close(found, logits.exp(), rtol=0, atol=2e-5)
    kept = drawing.draw_codes(logits.expand(len(u), -1), u, 1.0, 3, 0.8)
    assert sorted(kept.unique().tolist()) == [1, 2]  # 2 and 1 hold 0.84 of the mass, 2 alone 0.65


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 19, 32])
def test_nothing_outside_the_tensors_is_read_or_written(cpu_kernels, dtype, channels):
    """Every tensor lies between NaN; the codes are those without, and the NaN stays."""
    made = model(dtype, hidden_channels=channels, condition_channels=3)
    expected, fenced = (
        CachedSampler(
            PackedPixelCNN(made),
            torch.full((5, 4, 4), -1),
            torch.rand(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
            None,
            torch.ones(5, 3, 4, 4),
            EVERYTHING,
            backend="cpu",
        )
        for _ in range(2)
    )
    fences = []

    def fence(x: torch.Tensor) -> torch.Tensor:
        around = torch.full((x.numel() + 128,), torch.nan, dtype=x.dtype)
        fences.append(around)
        around[64:-64] = x.flatten()
        return around[64:-64].view(x.shape)

    fenced.packed.weights, fenced.cache = fence(fenced.packed.weights), fence(fenced.cache)
    fenced.biases, fenced.condition = fence(fenced.biases), fence(fenced.condition)
    logits = fence(torch.zeros(16, 5, 50, dtype=dtype))
    expected.advance(0, 16)
    fenced.advance(0, 16, logits)
    assert torch.equal(fenced.codes, expected.codes) and logits.isfinite().all()
    assert all(around[:64].isnan().all() and around[-64:].isnan().all() for around in fences)


class Allocations(TorchDispatchMode):
    """Counts results whose memory is none of their arguments'."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        known = {x.untyped_storage().data_ptr() for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)}
        result = function(*arguments, **(keywords or {}))
        for x in tree_leaves(result):
            self.count += isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known
        return result


def test_memory_does_not_grow(cpu_kernels):
    """After the first grids, a hundred more allocate no tensor and leave the process no larger."""
    made = model(torch.float32, hidden_channels=64)
    one = sampler(made, 16)

    def again(times: int) -> None:
        for _ in range(times):
            one.codes.fill_(-1)
            for position in range(16):
                one.advance(position, position + 1)

    again(20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Allocations() as allocations:
        again(1)
    assert allocations.count == 0
    again(100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KB


@pytest.mark.parametrize("overload", ["default", "eager"])
def test_opcheck(overload, cpu_kernels):
    one = sampler(model(), 3)
    packed, sizes = one.packed, one.packed.sizes
    logits = one.cache.new_empty(4, 3, sizes.num_codes)
    arguments = (one.codes, one.cache, logits, packed.weights, one.biases, None, one.noise, list(sizes), True, 0, 4,
                 1.0, 0, 1.0, 1.0)  # fmt: skip
    operator = getattr(torch.ops.vqkernels.pixelcnn_step, overload)
    opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_the_layout_is_what_the_sizes_say():
    for sizes in (PixelCNNSizes(5, 3, 9, 11, 5, 7, 0), PixelCNNSizes(33, 1, 64, 40, 3, 3, 4)):
        for dtype in (torch.float32, torch.float64):
            matrices = [torch.randn(inputs, outputs).to(dtype) for _, inputs, outputs in sizes.matrices()]
            assert len(pack(matrices)) == packed_elements(sizes, dtype)


def test_bad_input_is_one_sentence(backend):
    one = sampler(model(), 2, backend=backend)
    sizes, weights = one.packed.sizes, one.packed.weights
    good = dict(codes=one.codes, cache=one.cache, logits=one.no_logits, weights=weights, biases=one.biases,
                condition=None, noise=one.noise, residual_head=True, begin=0, end=1, backend=backend)  # fmt: skip

    def refused(sentence: str, **changed: object) -> None:
        with pytest.raises(ValueError, match=sentence):
            advance(sizes, **{**good, **changed})

    refused(r"codes must be \(B, H, W\) int64", codes=one.codes.float())
    refused("begin and end must be positions of a 4 x 4 grid in order, got 3, 17", begin=3, end=17)
    refused(r"biases must be \(layers, 2 or 4, 4C\)", biases=one.biases[:, :1])
    refused("cache must be contiguous of shape", cache=one.cache[1:])
    refused("weights must be contiguous of shape", weights=weights[:-1])
    refused("noise must be torch.float64, got torch.float32", noise=one.noise.float())
    refused("cache must be torch.float64, got torch.float32", cache=one.cache.float())
    refused("condition must be contiguous of shape", condition=torch.zeros(2, 4, 4, 1, dtype=torch.float64))


def test_the_kernel_reads_no_code_out_of_range(cpu_kernels):
    one = sampler(model(), 2)
    with pytest.raises(RuntimeError, match="codes before position 5 must be known"):
        one.advance(5, 6)
    one.codes[1, 3, 3] = 50
    with pytest.raises(RuntimeError, match="codes must be below 50, but one is 50"):
        one.advance(0, 1)
