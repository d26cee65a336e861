"""The C++ entropy sweeps: threads, SIMD levels, the exponential, logits beyond float32, memory."""

import os
import subprocess
import sys

import pytest
import torch
from native import inspection
from ops.entropy_gradients import WEIGHTS, close, gradients, scalar

import vqkernels as vq
from vqkernels import reference
from vqkernels.backends import cpu


def bits_of_a_step(z, codebook, temperature, **options):
    leaf, codes = z.detach().requires_grad_(), codebook.detach().requires_grad_()
    found = vq.entropy_loss(leaf, codes, temperature, backend="cpu", **options)
    torch.autograd.backward(found, [torch.tensor(0.3, dtype=x.dtype) for x in found])
    return [*(x.detach() for x in found), leaf.grad, codes.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_threads(dtype, threads, cpu_kernels):
    z, codebook, mask = torch.randn(1003, 9).to(dtype), torch.randn(301, 9).to(dtype), torch.rand(1003) < 0.8
    runs = []
    for count in (1, 2, 7, 2):
        threads(count)
        runs.append(bits_of_a_step(z, codebook, 0.7, mask=mask))
    for run in runs[1:]:
        assert all(a.equal(b) for a, b in zip(run, runs[0], strict=True))


def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(cpu_kernels):
    """Whatever panel, tile and lane a row falls into; codes come in another order, so its sums may be rounded anew."""
    z, codebook = torch.randn(200, 7), torch.randn(90, 7)
    raw = torch.ops.vqkernels.entropy.default
    whole, shifted = (raw(x, codebook, None, 1, "euclidean", scalar(0.5))[2] for x in (z, z[13:]))
    assert whole[:, 13:].equal(shifted)


def test_simd_levels_agree(monkeypatch, cpu_kernels):
    levels = cpu.simd_levels()
    if len(levels) < 2:
        pytest.skip("one SIMD level")
    for rows, codes, dim, temperature in ((130, 300, 16, 1.0), (77, 61, 5, 0.05), (1, 1, 1, 1.0)):
        z, codebook, runs = torch.randn(rows, dim), torch.randn(codes, dim), []
        for level in levels:
            monkeypatch.setenv("VQKERNELS_SIMD", level)
            runs.append(bits_of_a_step(z, codebook, temperature))
        for run in runs[1:]:
            close(run, runs[0], 2e-5)


def test_the_exponential_is_within_one_and_a_half_units_in_the_last_place(monkeypatch):
    x = torch.cat([torch.linspace(-126, 20, 1_000_001), torch.linspace(-1, 1, 500_001), torch.tensor([-126.0])])
    exact = x.double().exp2()
    ulp = torch.exp2(exact.log2().floor() - 23)
    for level in cpu.simd_levels():
        monkeypatch.setenv("VQKERNELS_SIMD", level)
        found = torch.from_numpy(inspection.exponential(x.numpy()))
        assert float(((found.double() - exact).abs() / ulp).max()) <= 1.5
        assert found[-1] == 2.0**-126
        nothing = torch.tensor([-126.0]).nextafter(torch.tensor(-torch.inf)).repeat(3)
        nothing[1], nothing[2] = -1e30, -1e5
        assert torch.from_numpy(inspection.exponential(nothing.numpy())).eq(0).all()


@pytest.mark.parametrize("temperature", [1e-8, 1e-30, 1e-100])
@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-25])
def test_logits_beyond_float32_are_computed_in_float64(scale, temperature, cpu_kernels):
    """Rows between two codes at the far end of float32's range: what is left of a difference decides."""
    z, codebook = torch.randn(60, 4) * scale, torch.randn(30, 4) * scale
    z[:20] = (codebook[:20] + codebook[10:30]) / 2
    temperature *= scale**2
    found = vq.entropy_loss(z, codebook, temperature, backend="cpu")
    close(found, reference.entropy_loss(z, codebook, temperature), 1e-5)
    ours = gradients(vq.entropy_loss, z, codebook, temperature, WEIGHTS["both"], backend="cpu")
    theirs = gradients(reference.entropy_loss, z.double(), codebook.double(), temperature, WEIGHTS["both"])
    for mine, true in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6 * float(true.abs().max()))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_no_matrix_is_allocated_in_the_kernels(cpu_kernels):
    """The peak of a whole step stays far below one N x K matrix: near the inputs' packed copies and the gradients."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of this process cannot be reset")
    rows, codes, dim = 6000, 5000, 8
    program = (
        "import torch, vqkernels as vq\n"
        "from pathlib import Path\n"
        "from vqkernels.bench.memory import resident\n"
        "def step(rows, codes):\n"
        f"    z, e = torch.randn(rows, {dim}, requires_grad=True), torch.randn(codes, {dim}, requires_grad=True)\n"
        "    before = resident('VmRSS'); Path('/proc/self/clear_refs').write_text('5')\n"
        "    sample, whole = vq.entropy_loss(z, e, 1.0, backend='cpu'); (sample - whole).backward()\n"
        "    return resident('VmHWM') - before\n"
        f"torch.set_num_threads(2); step(64, 64); print(step({rows}, {codes}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    megabytes, matrix = float(done.stdout), 4 * rows * codes / 1e6
    assert megabytes < 6 * 4 * (rows + codes) * dim / 1e6 + 1 < matrix / 20
