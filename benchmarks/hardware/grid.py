"""The benchmark grid: search, forward and backward, training step, beside the peers; residuals; small N under graphs.

Every contender's indices are compared with the contract on a sample of rows before anything is timed; a wrong index of
ours ends the cell. Peers search in the types they are given: fp32 and fp16 are told apart by name.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vqkernels as vq
from benchmarks.hardware.checks import Row
from benchmarks.hardware.residual import residual_times
from benchmarks.hardware.setting import Setting
from vqkernels import reference
from vqkernels.bench.layers import TRAINING, ours_trained
from vqkernels.bench.peers import addmm_argmin, gpu_search, unavailable

# the cells that published figures exist for come first
LARGE = [(1 << 20, k, d) for d in (64, 128, 256) for k in (16384, 1024)]
REST = [(n, k, d) for n in (65536, 1 << 20) for k in (1024, 16384) for d in (32, 64, 128, 256, 512)]
CELLS = LARGE + [cell for cell in REST if cell not in LARGE]
SMALL = [(n, 1024, 64) for n in (256, 1024, 4096, 16384)]
CHECKED = 1024


def grid(setting: Setting) -> Iterator[Row]:
    if setting.wheels is not None:
        yield {"what": "wheels of peers", "problem": install(setting.wheels)}
    torch._dynamo.config.cache_size_limit = 256
    for cell in setting.size(CELLS, [(40, 20, 8)]):
        yield _search(setting, *cell)
        yield _training(setting, *cell)
    yield from residual_times(setting)
    for cell in setting.size(SMALL, [(16, 20, 8)]):
        yield _graphed(setting, *cell)


def install(wheels: Path) -> str | None:
    """Make the wheels of a folder importable, without their dependencies; returns why that failed, or None."""
    found = sorted(str(path) for path in wheels.glob("*.whl"))
    if not found:
        return f"there is no wheel in {wheels}"
    target = tempfile.mkdtemp(prefix="wheels-")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, *found]
    done = subprocess.run(command, capture_output=True, text=True)
    sys.path.append(target)
    return done.stderr[-300:] if done.returncode else None


def ours(z: Tensor, codebook: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Our searches of fp32 inputs, and of their fp16 and bf16 roundings."""
    half, brain = (z.half(), codebook.half()), (z.bfloat16(), codebook.bfloat16())
    search = partial(vq.nearest_code, backend="triton")
    return {
        "exact fp32": partial(search, z, codebook),
        "exact fp16": partial(search, *half),
        "exact bf16": partial(search, *brain),
        "fast fp32": partial(search, z, codebook, precision="fast"),
        "fast fp16": partial(search, *half, precision="fast"),
    }


def _search(setting: Setting, n: int, k: int, d: int) -> Row:
    torch.manual_seed(0)
    z, codebook = torch.randn(n, d, device=setting.device), torch.randn(k, d, device=setting.device)
    contenders: dict[str, Callable[[], Any]] = dict(ours(z, codebook))
    for kind in (torch.float32, torch.float16):
        pair = z.to(kind), codebook.to(kind)
        for peer in gpu_search(setting.size("inductor", "eager")):
            name = f"{peer.name} {'fp32' if kind == torch.float32 else 'fp16'}"
            contenders[name] = peer.prepare(*pair)
    row: Row = {"what": "search", "N": n, "K": k, "D": d, "wrong rows of a sample": {}}
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    expected = {name: reference.nearest(z[:CHECKED].to(kind), codebook.to(kind)) for name, kind in kinds.items()}
    for name, search in contenders.items():
        try:
            wrong: int | str = int((search()[:CHECKED] != expected[name[-4:]]).sum())
        except Exception as error:  # an absent peer, or memory: the clock will tell which
            wrong = type(error).__name__
        row["wrong rows of a sample"][name] = wrong
        if name.startswith("exact") and wrong != 0:
            return row | {"problem": f"{name} is wrong: nothing was timed"}
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    _, decided = vq.nearest_code(z, codebook, backend="triton", return_certificate=True)
    half, half_codes = z.half(), codebook.half().T
    contenders["torch.mm fp16, for scale"] = lambda: torch.mm(half, half_codes)
    return row | {"decided by the filter": round(float(decided), 6), "times": setting.times(contenders)}


def _training(setting: Setting, n: int, k: int, d: int) -> Row:
    torch.manual_seed(0)
    z = torch.randn(n, d, device=setting.device, requires_grad=True)
    codes = torch.randn(k, d, device=setting.device, requires_grad=True)

    def both_ways() -> tuple[Tensor, ...]:
        quantized, _, loss, commitment = vq.vector_quantize(z, codes, backend="triton")
        return torch.autograd.grad(quantized.sum() + loss + commitment, (z, codes))

    rows, row = z.detach(), {"what": "training", "N": n, "K": k, "D": d}
    contenders: dict[str, Callable[[], Any]] = {
        "forward+backward": both_ways,
        "train step, EMA": ours_trained(0.99, "triton").prepare(rows, codes.detach()),
    }
    peer = next(layer for layer in TRAINING if layer.name == "lucidrains EMA")
    if problem := unavailable(peer.module, peer.package):
        row["peer"] = problem
    else:
        contenders["lucidrains train step, EMA"] = peer.prepare(rows, codes.detach())
    return row | {"times": setting.times(contenders)}


def _graphed(setting: Setting, n: int, k: int, d: int) -> Row:
    """Small N, where launches cost more than the work: as it is, and as a CUDA graph."""
    z, codebook = torch.randn(n, d, device=setting.device), torch.randn(k, d, device=setting.device)
    contenders: dict[str, Callable[[], Any]] = {}
    plain = {"exact fp32": ours(z, codebook)["exact fp32"], "addmm+argmin": partial(addmm_argmin, z, codebook)}
    for name, search in plain.items():
        contenders[name] = search
        contenders[f"{name}, graph"] = setting.replayed(search)
    expected = reference.nearest(z[:CHECKED], codebook)
    wrong = int((contenders["exact fp32, graph"]()[:CHECKED] != expected).sum())
    row: Row = {"what": "small N", "N": n, "K": k, "D": d, "wrong rows of a sample": wrong}
    return row if wrong else row | {"times": setting.times(contenders)}
