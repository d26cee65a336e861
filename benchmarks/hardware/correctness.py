"""Every kernel proved before anything is timed: the contract suite, a random attack, whole arrays against the fallback,
the sanitizer, a training step in which the host may not wait, and CUDA graphs that repeat every bit.
"""

import collections
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

import vqkernels as vq
from benchmarks.hardware.residual import residual_correctness
from benchmarks.hardware.setting import ROOT, Setting
from benchmarks.hardware.timing import replayed
from vqkernels.nn import VectorQuantizer
from vqkernels.verification.adversaries import ADVERSARIES
from vqkernels.verification.attack import attack
from vqkernels.verification.suite import verify

Row = dict[str, Any]
SANITIZED = (
    "import torch, vqkernels as vq\n"
    "z = torch.randn(3, 64, 17, 9, device='cuda', requires_grad=True); e = torch.randn(333, 64, device='cuda')\n"
    "e.requires_grad_(); m = torch.rand(3, 17, 9, device='cuda') < 0.8\n"
    "q, i, a, b = vq.vector_quantize(z, e, mask=m, channel_dim=1, backend='triton')\n"
    "(q.sum() + a + b).backward(); vq.codebook_statistics(z, i, 333, channel_dim=1, backend='triton')\n"
    "torch.cuda.synchronize()\n"
)


def correctness(setting: Setting) -> Iterator[Row]:
    """Rows {"what", "ok", ...}; the last is the verdict."""
    rows: list[Row] = []
    for row in itertools.chain(
        _suite(setting), _no_waiting(setting), _graphs(setting), _whole_arrays(setting), residual_correctness(setting),
        _attacked(setting), _sanitizer(setting),
    ):  # fmt: skip
        rows.append(row)
        yield row
    yield {"what": "verdict", "ok": all(row["ok"] is not False for row in rows)}


def _suite(setting: Setting) -> Iterator[Row]:
    workers = 1 if setting.dry else min(8, os.cpu_count() or 1)
    for outcome in verify("triton", setting.device, every=setting.size(1, 60), workers=workers):
        yield {
            "what": f"{outcome.operator}: {outcome.claim}",
            "ok": not outcome.failures,
            "cases": outcome.cases,
            "failures": list(outcome.failures[:20]),
        }


def _no_waiting(setting: Setting) -> Iterator[Row]:
    """A training step, forward and backward, under the mode in which every wait of the host is an error."""
    layer = VectorQuantizer(8, 32, channel_dim=1, ema_decay=0.99, backend="triton").to(setting.device)
    z = torch.randn(2, 8, 5, 5, device=setting.device, requires_grad=True)
    mask = torch.rand(2, 5, 5, device=setting.device) < 0.8

    def step() -> None:
        quantized, _, loss = layer(z, mask=mask)
        (quantized.sum() + loss).backward()

    step()  # compiles
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
    yield {"what": "a training step never waits for the device", "ok": problem is None, "problem": problem}


def _graphs(setting: Setting) -> Iterator[Row]:
    for name in ("gaussian", "collapsed", "non-finite rows"):
        z, codebook = (x.to(setting.device) for x in ADVERSARIES[name](*setting.size((1000, 333, 64), (20, 9, 6))))
        held, codes = z.clone().requires_grad_(), codebook.clone().requires_grad_()

        def step(held=held, codes=codes) -> list[torch.Tensor]:
            quantized, indices, loss, commitment = vq.vector_quantize(held, codes, backend="triton")
            grads = torch.autograd.grad(quantized.sum() + loss + commitment, (held, codes))
            return [quantized.detach(), indices, loss.detach(), *grads]

        replay = replayed(setting, step)
        with torch.no_grad():
            held.copy_(z.flip(0))
        first = [x.clone() for x in replay()]
        bits = [[x.flatten().view(torch.uint8) for x in outputs] for outputs in (first, step())]
        same = all(x.equal(y) for x, y in zip(*bits, strict=True))
        yield {"what": f"a CUDA graph repeats the bits of {name}", "ok": same}


def _whole_arrays(setting: Setting) -> Iterator[Row]:
    """Every index of large arrays against the fallback, which decides by a float32 bound and float64 alone."""
    shapes = [(1 << 20, 1024, 64), (1 << 18, 16384, 32), (1 << 18, 4096, 256), (1 << 20, 512, 8)]
    for shape in setting.size(shapes, [(60, 40, 8)]):
        for name in ("gaussian", "clustered", "offset 1e2"):
            z, codebook = (x.to(setting.device) for x in ADVERSARIES[name](*shape))
            found, decided = vq.nearest_code(z, codebook, backend="triton", return_certificate=True)
            wrong = int((found != vq.nearest_code(z, codebook, backend="eager")).sum())
            yield {
                "what": f"all rows of {name}, {shape}",
                "ok": wrong == 0,
                "rows": len(z),
                "wrong": wrong,
                "decided by the filter": round(float(decided), 6),
            }


def _attacked(setting: Setting) -> Iterator[Row]:
    minutes = setting.size(min(0.5, setting.left() / 600), 0.03)
    last = collections.deque(attack(minutes, ["triton"], seed=setting.size(1, 4), device=str(setting.device)), maxlen=1)
    for progress in last:
        failure = None if progress.failure is None else str(progress.failure)
        yield {"what": "random attack", "ok": failure is None, "rows": progress.rows, "failure": failure}


def _sanitizer(setting: Setting) -> Iterator[Row]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if setting.dry or tool is None:
        yield {"what": "compute-sanitizer", "ok": None, "problem": "not installed" if tool is None else "a rehearsal"}
        return
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=max(5, min(90, setting.left() / 4))
            )
        except subprocess.TimeoutExpired:
            yield {"what": f"compute-sanitizer {check}", "ok": None, "problem": "ran out of time"}
            continue
        yield {"what": f"compute-sanitizer {check}", "ok": done.returncode == 0, "end": done.stdout[-400:]}
