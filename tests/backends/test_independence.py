"""The same bits with 1, 2 and 7 threads at every SIMD level, each in a process of its own; the same indices at all."""

import json
import os
import subprocess
import sys

import pytest

from vqkernels.backends import cpu

PROGRAM = """
import hashlib, json, torch
import vqkernels as vq
from vqkernels.ops.quantize import quantize_with_statistics
from vqkernels.verification.adversaries import ADVERSARIES

def digest(*tensors):
    told = hashlib.sha256()
    for x in tensors:
        told.update(x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()

def results(z, codebook, mask, channel_dim):
    leaf, codes = z.detach().requires_grad_(), codebook.clone().requires_grad_()
    indices = vq.nearest_code(z, codebook, mask=mask, channel_dim=channel_dim, backend="cpu")
    whole = quantize_with_statistics(leaf, codes, mask=mask, channel_dim=channel_dim, backend="cpu", statistics=True)
    incoming = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z.dtype)
    losses = whole.codebook_loss + 0.25 * whole.commitment_loss
    torch.autograd.backward([whole.quantized, losses], [incoming, None])
    counts, sums = vq.codebook_statistics(z, indices, len(codebook), channel_dim=channel_dim)
    return digest(indices), {
        "search": digest(indices, whole.indices),
        "quantize": digest(whole.quantized, whole.codebook_loss, whole.commitment_loss),
        "its statistics": digest(whole.counts, whole.sums),
        "backward": digest(leaf.grad, codes.grad),
        "statistics": digest(counts, sums),
    }

told = {}
for name in ("gaussian", "clustered", "one ulp apart", "norms over eight decades", "half-integer lattice"):
    for rows, size, dim in ((5003, 77, 24), (40, 300, 64), (1500, 520, 5)):
        torch.manual_seed(0)
        z, codebook = ADVERSARIES[name](rows, size, dim)
        size = len(codebook)
        mask = torch.rand(len(z)) < 0.7
        first = z.T.contiguous()
        for label, x, kept, axis in (
            ("float32", z, None, 1), ("masked", z, mask, 1),
            ("channels first", first, None, 0), ("bfloat16", z.bfloat16(), None, 1),
        ):
            case = f"{name} {rows}x{size}x{dim} {label}"
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                indices, bits = results(x, codebook, kept, axis)
                told.setdefault(case, {})[threads] = {"indices": indices, **bits}
print(json.dumps(told))
"""


def run(level: str) -> dict[str, dict[str, dict[str, str]]]:
    """Digests by case, thread count and result, computed by a new process at one SIMD level."""
    environment = {**os.environ, "VQKERNELS_SIMD": level}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_threads_change_no_bit_and_levels_no_index(cpu_kernels):
    levels = cpu.simd_levels()
    if not levels:
        pytest.skip("the C++ kernels name no SIMD level")
    indices: dict[str, str] = {}
    for level in levels:
        told = run(level)
        assert len(told) == 60
        for case, by_threads in told.items():
            assert set(by_threads) == {"1", "2", "7"}
            for threads in ("2", "7"):
                for result, digest in by_threads[threads].items():
                    assert digest == by_threads["1"][result], f"{level}, {case}: {result} differs on {threads} threads"
            expected = indices.setdefault(case, by_threads["1"]["indices"])
            assert by_threads["1"]["indices"] == expected, f"{level}, {case}: other indices than at {levels[0]}"
