"""What is asked of the kernels of each backend: the contract, whole arrays, no waiting, graphs, the sanitizer."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import vqkernels as vq
from benchmarks.hardware.setting import ROOT, Setting
from vqkernels.verification.adversaries import ADVERSARIES
from vqkernels.verification.suite import verify

Row = dict[str, Any]
Step = Callable[[], list[Tensor]]


def with_verdict(rows: Iterable[Row], **more: Any) -> Iterator[Row]:
    """The rows, and one more that says whether all were right."""
    right = True
    for row in rows:
        right = right and row["ok"] is not False
        yield row
    yield {"what": "verdict", "ok": right} | more


def contract(setting: Setting, backend: str, workers: int = 1) -> Iterator[Row]:
    """One row for each claim of `vqkernels verify`."""
    for outcome in verify(backend, setting.device, every=setting.size(1, 60), workers=1 if setting.dry else workers):
        what, failures = f"{outcome.operator}: {outcome.claim}", list(outcome.failures[:20])
        yield {"what": what, "ok": not outcome.failures, "cases": outcome.cases, "failures": failures}


def whole_arrays(setting: Setting, backend: str, shapes: Iterable[tuple[int, int, int]]) -> Iterator[Row]:
    """Every index of large arrays against the fallback, which decides by a float32 bound and float64 alone."""
    for shape in shapes:
        for name in ("gaussian", "clustered", "offset 1e2"):
            z, codebook = (x.to(setting.device) for x in ADVERSARIES[name](*shape))
            found, decided = vq.nearest_code(z, codebook, backend=backend, return_certificate=True)
            wrong = int((found != vq.nearest_code(z, codebook, backend="eager")).sum())
            what, share = f"all rows of {name}, {shape}", round(float(decided), 6)
            yield {"what": what, "ok": wrong == 0, "rows": len(z), "wrong": wrong, "decided by the filter": share}


def waits(setting: Setting, step: Callable[[], Any]) -> str | None:
    """What a step that has run before waits for: it runs under the mode in which every wait of the host is an error."""
    if setting.device.type != "cuda":
        step()
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def no_waiting(setting: Setting, step: Callable[[], Any]) -> Row:
    step()  # compiles
    problem = waits(setting, step)
    return {"what": "a training step never waits for the device", "ok": problem is None, "problem": problem}


def repeats_as_graph(setting: Setting, step: Step, change: Callable[[], Any] = lambda: None) -> bool:
    """Whether a CUDA graph of the step gives the same bits, also after `change` wrote other values into its inputs."""
    replay = setting.replayed(step)
    with torch.no_grad():
        change()
    first = [x.clone() for x in replay()]
    bits = [[x.flatten().view(torch.uint8) for x in outputs] for outputs in (first, step())]
    return all(x.equal(y) for x, y in zip(*bits, strict=True))


def quantization(z: Tensor, codebook: Tensor, backend: str) -> Step:
    """Forward and backward of one quantization of leaves that stay where they are."""

    def step() -> list[Tensor]:
        quantized, indices, loss, commitment = vq.vector_quantize(z, codebook, backend=backend)
        grads = torch.autograd.grad(quantized.sum() + loss + commitment, (z, codebook))
        return [quantized.detach(), indices, loss.detach(), *grads]

    return step


def sanitized(setting: Setting, program: str, tools: Iterable[str]) -> Iterator[Row]:
    """What compute-sanitizer says of a program."""
    path = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin"
    found = shutil.which("compute-sanitizer", path=path)
    if setting.dry or found is None:
        yield {"what": "compute-sanitizer", "ok": None, "problem": "a rehearsal" if setting.dry else "not installed"}
        return
    for tool in tools:
        command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program]
        seconds = max(5, min(90, setting.left() / 4))
        row: Row = {"what": f"compute-sanitizer {tool}", "ok": None}
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            yield row | {"problem": "ran out of time"}
            continue
        # initcheck also sees torch's own padding: it is reported and not judged
        yield row | {"ok": None if tool == "initcheck" else done.returncode == 0, "end": done.stdout[-400:]}
