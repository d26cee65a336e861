"""The CUDA C++ kernels: proved (the contract suite, whole arrays, the sanitizer, no waiting, graphs), then timed beside
the Triton kernels and `index_add_`. They must be built (FORCE_CUDA=1 pip install -e .); a rehearsal runs them on the
executor of tests/native.
"""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import vqkernels as vq
from benchmarks.hardware.setting import ROOT, Setting
from benchmarks.hardware.timing import replayed, times
from vqkernels.backends import proof
from vqkernels.verification.adversaries import ADVERSARIES
from vqkernels.verification.suite import verify

Row = dict[str, Any]
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
    rows: list[Row] = []
    for row in itertools.chain(
        _suite(setting), _sums(setting), _indices(setting), _no_waiting(setting), _graph(setting), _sanitizer(setting)
    ):
        rows.append(row)
        yield row
    verdict: Row = {"what": "verdict", "ok": all(row["ok"] is not False for row in rows)}
    if not setting.dry:
        one = next(gpu_ for gpu_ in proof.visible() if gpu_.number == setting.device.index)
        verdict["verification key"] = proof.key("cuda", one)._asdict()
    yield verdict


def _suite(setting: Setting) -> Iterator[Row]:
    for outcome in verify("cuda", setting.device, every=setting.size(1, 60)):
        yield {
            "what": f"{outcome.operator}: {outcome.claim}",
            "ok": not outcome.failures,
            "cases": outcome.cases,
            "failures": list(outcome.failures[:20]),
        }


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


def _indices(setting: Setting) -> Iterator[Row]:
    """Every index of large arrays against the fallback."""
    for shape in setting.size(SEARCHES, [(40, 70, 8)]):
        for name in ("gaussian", "clustered", "offset 1e2"):
            z, codebook = (x.to(setting.device) for x in ADVERSARIES[name](*shape))
            found, decided = vq.nearest_code(z, codebook, backend="cuda", return_certificate=True)
            wrong = int((found != vq.nearest_code(z, codebook, backend="eager")).sum())
            what = f"all rows of {name}, {shape}"
            yield {"what": what, "ok": wrong == 0, "wrong": wrong, "decided by the filter": round(float(decided), 6)}


def _step(setting: Setting, n: int, k: int, d: int, backend: str) -> Callable[[], list[Tensor]]:
    """Forward and backward of one quantization, into tensors that stay where they are."""
    z, codes = _drawn(setting, n, k, d)[0].requires_grad_(), _drawn(setting, k, 1, d)[0].requires_grad_()

    def step() -> list[Tensor]:
        quantized, indices, loss, commitment = vq.vector_quantize(z, codes, backend=backend)
        grads = torch.autograd.grad(quantized.sum() + loss + commitment, (z, codes))
        return [quantized.detach(), indices, loss.detach(), *grads]

    return step


def _no_waiting(setting: Setting) -> Iterator[Row]:
    step = _step(setting, *setting.size(STEP, (40, 20, 8)), "cuda")
    step()
    problem = None
    try:
        if setting.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        step()
    except RuntimeError as error:
        problem = str(error).partition("\n")[0]
    finally:
        if setting.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    yield {"what": "a step never waits for the device", "ok": problem is None, "problem": problem}


def _graph(setting: Setting) -> Iterator[Row]:
    step = _step(setting, *setting.size((5000, 333, 64), (40, 20, 8)), "cuda")
    first, again = [x.clone() for x in replayed(setting, step)()], step()
    same = all(x.equal(y) for x, y in zip(first, again, strict=True))
    yield {"what": "a CUDA graph repeats the bits of a step", "ok": same}


def _sanitizer(setting: Setting) -> Iterator[Row]:
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")
    if setting.dry or tool is None:
        yield {"what": "compute-sanitizer", "ok": None, "problem": "a rehearsal" if setting.dry else "not installed"}
        return
    for check in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=max(5, min(90, setting.left() / 4))
            )
        except subprocess.TimeoutExpired:
            yield {"what": f"compute-sanitizer {check}", "ok": None, "problem": "ran out of time"}
            continue
        # initcheck also sees torch's own padding: told, not judged
        ok = done.returncode == 0 if check != "initcheck" else None
        yield {"what": f"compute-sanitizer {check}", "ok": ok, "end": done.stdout[-400:]}


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
        yield {"what": "statistics", "N": n, "K": k, "D": d, "times": times(setting, contenders)}
    for n, k, d in setting.size(SEARCHES, [(40, 70, 8)]):
        z, codebook = _drawn(setting, n, k, d)[0], _drawn(setting, k, 1, d)[0]
        searches: dict[str, Callable[[], Any]] = {
            f"{name}, {precision}": lambda z=z, codebook=codebook, name=name, precision=precision: vq.nearest_code(
                z, codebook, precision=precision, backend=name
            )
            for name in ("cuda", "triton")
            for precision in ("exact", "fast")
        }
        yield {"what": "search", "N": n, "K": k, "D": d, "times": times(setting, searches)}
    n, k, d = setting.size(STEP, (40, 20, 8))
    steps = {name: replayed(setting, _step(setting, n, k, d, name)) for name in ("cuda", "triton")}
    yield {"what": "training step as a CUDA graph", "N": n, "K": k, "D": d, "times": times(setting, steps)}
