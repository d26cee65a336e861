"""The CUDA C++ kernels: proved (the contract suite, whole arrays, the sanitizer, no waiting, graphs), then timed beside
the Triton kernels and `index_add_`. They must be built (FORCE_CUDA=1 pip install -e .); a rehearsal runs them on the
executor of tests/native.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import vqkernels as vq
from benchmarks.hardware.checks import (
    Row,
    Step,
    contract,
    no_waiting,
    quantization,
    repeats_as_graph,
    sanitized,
    whole_arrays,
    with_verdict,
)
from benchmarks.hardware.setting import ROOT, Setting
from vqkernels.backends import proof

SANITIZED = (
    "import torch, vqkernels as vq\n"
    "z = torch.randn(3, 64, 17, 9, device='cuda', requires_grad=True); e = torch.randn(333, 64, device='cuda')\n"
    "e.requires_grad_(); m = torch.rand(3, 17, 9, device='cuda') < 0.8\n"
    "for mode in ('straight_through', 'rotation'):\n"
    "  q, i, a, b = vq.vector_quantize(z, e, mask=m, channel_dim=1, gradient=mode, backend='cuda')\n"
    "  (q.sum() + a + b).backward(); vq.codebook_statistics(z, i, 333, channel_dim=1, backend='cuda')\n"
    "x = torch.randn(20000, 64, device='cuda'); j = torch.zeros(20000, dtype=torch.int64, device='cuda')\n"
    "vq.codebook_statistics(x, j, 5, backend='cuda'); vq.nearest_code(x, e.detach(), backend='cuda')\n"
    "torch.cuda.synchronize()\n"
)
STATISTICS = [(1 << 20, 65536, 64), (1 << 20, 512, 64), (1 << 18, 1024, 256)]
SEARCHES = [(1 << 20, 1024, 64), (1 << 20, 16384, 64), (1 << 18, 8192, 32), (1 << 18, 4096, 256)]
STEP = (1024, 512, 64)


def absence(setting: Setting) -> str | None:
    """Why these kernels cannot run here, or None. Prepares a rehearsal."""
    if not setting.dry:
        return proof.state("cuda", setting.device.index)[0] or None
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    from native import build, cuda_rehearsal  # type: ignore[import-not-found]  # of the source tree, which this needs

    if build.compiler() is None:
        return "a rehearsal needs a C++ compiler"
    if not any(getattr(one, "rehearses_cuda", False) for one in setting.kept):
        library = cuda_rehearsal.rehearse()
        library.rehearses_cuda = True
        setting.kept.append(library)
    return None


def cuda_correctness(setting: Setting) -> Iterator[Row]:
    """Rows {"what", "ok", ...}; the last is the verdict, with the key that it vouches for."""
    if problem := absence(setting):
        yield {"what": "the CUDA kernels", "ok": None, "problem": problem}
        return
    more: Row = {}
    if not setting.dry:
        one = next(gpu_ for gpu_ in proof.visible() if gpu_.number == setting.device.index)
        more["verification key"] = proof.key("cuda", one)._asdict()
    yield from with_verdict(
        itertools.chain(
            contract(setting, "cuda"),
            _sums(setting),
            whole_arrays(setting, "cuda", setting.size(SEARCHES, [(40, 70, 8)])),
            _steps(setting),
            sanitized(setting, SANITIZED, ("memcheck", "racecheck", "initcheck", "synccheck")),
        ),
        **more,
    )


def _drawn(setting: Setting, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(setting.device).manual_seed(0)
    z = torch.randn(n, d, generator=generator, device=setting.device)
    return z, torch.randint(k, (n,), generator=generator, device=setting.device)


def _sums(setting: Setting) -> Iterator[Row]:
    """Whole arrays against float64, evenly used, skewed and collapsed; the same bits twice."""
    for (n, k, d), used in itertools.product(
        setting.size(STATISTICS, [(700, 9, 5)]), ("evenly", "skewed", "collapsed")
    ):
        z, indices = _drawn(setting, n, k, d)
        if used == "skewed":
            indices = (indices.double().square() / k).long()
        elif used == "collapsed":
            indices = torch.full_like(indices, k // 2)
        counts, sums = vq.codebook_statistics(z, indices, k, backend="cuda")
        again = vq.codebook_statistics(z, indices, k, backend="cuda")
        expected = torch.zeros(k, d, dtype=torch.float64, device=z.device).index_add_(0, indices, z.double())
        error = float((sums.double() - expected).abs().max() / expected.abs().max())
        same = counts.equal(again[0]) and sums.equal(again[1])
        ok = same and error < 1e-6 and counts.equal(torch.bincount(indices, minlength=k))
        yield {"what": f"sums of codes used {used}", "ok": ok, "N": n, "K": k, "D": d, "error": error, "repeats": same}


def _step(setting: Setting, n: int, k: int, d: int, backend: str) -> Step:
    z, codes = _drawn(setting, n, k, d)[0].requires_grad_(), _drawn(setting, k, 1, d)[0].requires_grad_()
    return quantization(z, codes, backend)


def _steps(setting: Setting) -> Iterator[Row]:
    yield no_waiting(setting, _step(setting, *setting.size(STEP, (40, 20, 8)), "cuda"))
    same = repeats_as_graph(setting, _step(setting, *setting.size((5000, 333, 64), (40, 20, 8)), "cuda"))
    yield {"what": "a CUDA graph repeats the bits of a step", "ok": same}


def _index_add(z: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What many implementations do: atomics, whose order changes from run to run."""
    sums = torch.zeros(k, z.shape[1], dtype=z.dtype, device=z.device).index_add_(0, indices, z)
    return torch.bincount(indices, minlength=k), sums


def cuda_times(setting: Setting) -> Iterator[Row]:
    """Statistics beside index_add_, the search beside Triton's, and a small step as a CUDA graph."""
    if problem := absence(setting):
        yield {"what": "the CUDA kernels", "problem": problem}
        return
    for n, k, d in setting.size(STATISTICS, [(40, 20, 8)]):
        z, indices = _drawn(setting, n, k, d)
        contenders: dict[str, Callable[[], Any]] = {
            name: lambda z=z, indices=indices, k=k, name=name: vq.codebook_statistics(z, indices, k, backend=name)
            for name in ("cuda", "triton")
        }
        contenders["index_add_"] = lambda z=z, indices=indices, k=k: _index_add(z, indices, k)
        yield {"what": "statistics", "N": n, "K": k, "D": d, "times": setting.times(contenders)}
    for n, k, d in setting.size(SEARCHES, [(40, 70, 8)]):
        z, codebook = _drawn(setting, n, k, d)[0], _drawn(setting, k, 1, d)[0]
        searches: dict[str, Callable[[], Any]] = {
            f"{name}, {precision}": lambda z=z, codebook=codebook, name=name, precision=precision: vq.nearest_code(
                z, codebook, precision=precision, backend=name
            )
            for name in ("cuda", "triton")
            for precision in ("exact", "fast")
        }
        yield {"what": "search", "N": n, "K": k, "D": d, "times": setting.times(searches)}
    n, k, d = setting.size(STEP, (40, 20, 8))
    steps = {name: setting.replayed(_step(setting, n, k, d, name)) for name in ("cuda", "triton")}
    yield {"what": "training step as a CUDA graph", "N": n, "K": k, "D": d, "times": setting.times(steps)}
