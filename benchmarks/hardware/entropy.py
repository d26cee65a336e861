"""The entropy kernels on a GPU: right first (against float64, without waiting, bits repeated by a CUDA graph), then
timed beside plain PyTorch, which holds the N x K matrix several times.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.hardware.checks import Row, repeats_as_graph, waits
from benchmarks.hardware.setting import Setting
from vqkernels.backends.triton import entropy as kernels

FLOAT, DOUBLE, BRAIN, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
# (N, K, D, z, codebook, metric, temperature)
CASES = [
    (4096, 2048, d, kind, codes, metric, temperature * d)
    for d in (8, 32, 64, 257)
    for kind, codes in ((FLOAT, FLOAT), (BRAIN, BRAIN), (HALF, HALF), (DOUBLE, DOUBLE), (FLOAT, BRAIN))
    for metric, temperature in (("euclidean", 0.5), ("dot", 0.05))
] + [(100_000, 512, 32, FLOAT, FLOAT, "euclidean", 1.0), (60, 16384, 32, FLOAT, FLOAT, "dot", 0.3)]
TINY = [
    (40, 30, 8, FLOAT, FLOAT, "euclidean", 1.0), (33, 20, 5, BRAIN, BRAIN, "dot", 0.5),
    (20, 30, 8, DOUBLE, DOUBLE, "euclidean", 0.1),
]  # fmt: skip
STORED = {BRAIN: 2.0**-8, HALF: 2.0**-10, FLOAT: 0.0, DOUBLE: 0.0}  # what rounding a result costs
TIMED = [(8192, 16384, 32), (65536, 1024, 64), (65536, 16384, 64), (65536, 16384, 256)]


def dense(z: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Both entropies in plain PyTorch, by the matrix of logits."""
    products = z @ codebook.T
    logits = products if metric == "dot" else 2 * products - codebook.square().sum(1)  # but for a row's own constant
    logarithms = (logits / temperature).log_softmax(1)
    p = logarithms.exp()
    counted = torch.ones_like(z[:, 0]) if mask is None else mask.to(z.dtype)
    mean = (p * counted[:, None]).sum(0) / counted.sum()
    return -((p * logarithms).sum(1) * counted).sum() / counted.sum(), torch.special.entr(mean).sum()


def ours(z: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, temperature: float) -> list[Tensor]:
    """Forward and backward: both entropies (1,), and the gradients of sample - 2 codebook entropy (N, D) and (K, D)."""
    view = (z[None, None], codebook[None], None if mask is None else mask[None, None])
    sample, usage, *kept = kernels.entropy(*view, metric, temperature)
    one = torch.ones_like(sample)
    grad_z, grad_codebook = kernels.entropy_backward(one, -2 * one, *view, *kept, metric, temperature, True)
    return [sample, usage, grad_z[0, 0], grad_codebook[0]]


def theirs(z: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, temperature: float) -> list[Tensor]:
    """The same in plain PyTorch."""
    rows, codes = z.detach().requires_grad_(), codebook.detach().requires_grad_()
    sample, usage = dense(rows, codes, mask, metric, temperature)
    return [sample.detach(), usage.detach(), *torch.autograd.grad(sample - 2 * usage, (rows, codes))]


def entropy_correctness(setting: Setting) -> Iterator[Row]:
    """Rows {"what", "ok", ...}."""
    for n, k, d, kind, codes, metric, temperature in setting.size(CASES, TINY):
        z, codebook = _drawn(setting, n, k, d, kind, codes)
        mask = torch.arange(n, device=setting.device) % 5 != 0
        expected = theirs(z.double(), codebook.double(), mask, metric, temperature)
        found = ours(z, codebook, mask, metric, temperature)
        errors = [_off(one, other) for one, other in zip(found, expected, strict=True)]
        real = 2e-13 if DOUBLE in (kind, codes) else 1e-6
        logits = real * (1 + 4 * d / temperature)
        limits = [4 * logits, 4 * logits, 10 * logits + STORED[kind], 10 * logits + STORED[codes]]
        yield {
            "what": f"entropy of {kind}, {codes}, {metric}",
            "ok": all(error <= limit for error, limit in zip(errors, limits, strict=True)),
            "N": n, "K": k, "D": d, "temperature": temperature, "errors": errors, "limits": limits,
        }  # fmt: skip
    yield _poisoned(setting)
    yield _graph(setting)


def _drawn(setting: Setting, n: int, k: int, d: int, kind: torch.dtype, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(setting.device).manual_seed(0)
    z = torch.randn(n, d, generator=generator, device=setting.device)
    return z.to(kind), torch.randn(k, d, generator=generator, device=setting.device).to(codes)


def _off(found: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest element; infinite where NaN is expected and not found, or found."""
    if not torch.equal(found.flatten().isnan(), expected.flatten().isnan()):
        return float("inf")
    scale = expected.abs().max().clamp_min(1e-30)
    return float((found.double().flatten() - expected.flatten()).abs().max() / scale)


def _poisoned(setting: Setting) -> Row:
    """Rows and codes that are not finite, and masked ones, change nothing of the others but the entropies."""
    n, k = setting.size((1000, 333), (40, 20))
    z, codebook = _drawn(setting, n, k, 16, FLOAT, FLOAT)
    mask = torch.arange(n, device=setting.device) % 3 != 0
    good = mask.clone()
    z[::3] = torch.nan
    z[1, 2], z[4] = torch.nan, torch.inf
    good[[1, 4]] = False
    codebook[0, 0] = torch.inf
    sample, usage, grad_z, grad_codebook = ours(z, codebook, mask, "euclidean", 1.0)
    expected = theirs(z[good].double(), codebook[1:].double(), None, "euclidean", 1.0)
    ok = bool(sample.isnan() & usage.isnan()) and bool(grad_z[[1, 4]].isnan().all())
    ok = ok and not grad_z[~mask].any() and not grad_codebook[0].any()
    ok = ok and _off(grad_z[good], expected[2]) < 1e-4 and _off(grad_codebook[1:], expected[3]) < 1e-4
    return {"what": "entropy with rows and codes that are not finite", "ok": ok}


def _graph(setting: Setting) -> Row:
    """One call under the mode in which every wait is an error, and a CUDA graph that repeats it bit for bit."""
    z, codebook = _drawn(setting, *setting.size((5000, 3000, 64), (30, 20, 8)), FLOAT, FLOAT)

    def step() -> list[Tensor]:
        return ours(z, codebook, None, "euclidean", 1.0)

    first = step()
    problem = waits(setting, step)
    same = all(torch.equal(one, other) for one, other in zip(first, step(), strict=True))
    ok = same and problem is None and repeats_as_graph(setting, step)
    return {"what": "entropy repeats its bits, also in a CUDA graph", "ok": ok, "why": problem}


def entropy_times(setting: Setting) -> Iterator[Row]:
    """Forward and backward beside plain PyTorch: times and peak memory."""
    for n, k, d in setting.size(TIMED, [(40, 20, 8)]):
        z, codebook = _drawn(setting, n, k, d, FLOAT, FLOAT)
        half = z.bfloat16(), codebook.bfloat16()
        contenders: dict[str, Callable[[], Any]] = {
            "fp32": lambda z=z, codebook=codebook: ours(z, codebook, None, "euclidean", 1.0),
            "fp32, forward": lambda z=z, codebook=codebook: kernels.entropy(
                z[None, None], codebook[None], None, "euclidean", 1.0
            ),
            "bf16": lambda half=half: ours(*half, None, "euclidean", 1.0),
            "plain PyTorch fp32": lambda z=z, codebook=codebook: theirs(z, codebook, None, "euclidean", 1.0),
        }
        yield {"what": "entropy", "N": n, "K": k, "D": d, "times": setting.times(contenders)}
