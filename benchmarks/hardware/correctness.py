"""Every Triton kernel proved before anything is timed: the contract suite, a random attack, whole arrays against the
fallback, the sanitizer, a training step in which the host may not wait, and CUDA graphs that repeat every bit.
"""

import itertools
import os
from collections.abc import Iterator

import torch

from benchmarks.hardware.checks import (
    Row,
    contract,
    no_waiting,
    quantization,
    repeats_as_graph,
    sanitized,
    whole_arrays,
    with_verdict,
)
from benchmarks.hardware.residual import residual_correctness
from benchmarks.hardware.setting import Setting
from vqkernels.nn import VectorQuantizer
from vqkernels.verification.adversaries import ADVERSARIES
from vqkernels.verification.attack import attack

SANITIZED = (
    "import torch, vqkernels as vq\n"
    "z = torch.randn(3, 64, 17, 9, device='cuda', requires_grad=True); e = torch.randn(333, 64, device='cuda')\n"
    "e.requires_grad_(); m = torch.rand(3, 17, 9, device='cuda') < 0.8\n"
    "q, i, a, b = vq.vector_quantize(z, e, mask=m, channel_dim=1, backend='triton')\n"
    "(q.sum() + a + b).backward(); vq.codebook_statistics(z, i, 333, channel_dim=1, backend='triton')\n"
    "torch.cuda.synchronize()\n"
)
SHAPES = [(1 << 20, 1024, 64), (1 << 18, 16384, 32), (1 << 18, 4096, 256), (1 << 20, 512, 8)]


def correctness(setting: Setting) -> Iterator[Row]:
    """Rows {"what", "ok", ...}; the last is the verdict."""
    yield from with_verdict(
        itertools.chain(
            contract(setting, "triton", workers=min(8, os.cpu_count() or 1)),
            _training_step(setting),
            _graphs(setting),
            whole_arrays(setting, "triton", setting.size(SHAPES, [(60, 40, 8)])),
            residual_correctness(setting),
            _attacked(setting),
            sanitized(setting, SANITIZED, ("memcheck", "racecheck")),
        )
    )


def _training_step(setting: Setting) -> Iterator[Row]:
    layer = VectorQuantizer(8, 32, channel_dim=1, ema_decay=0.99, backend="triton").to(setting.device)
    z = torch.randn(2, 8, 5, 5, device=setting.device, requires_grad=True)
    mask = torch.rand(2, 5, 5, device=setting.device) < 0.8

    def step() -> None:
        quantized, _, loss = layer(z, mask=mask)
        (quantized.sum() + loss).backward()

    yield no_waiting(setting, step)


def _graphs(setting: Setting) -> Iterator[Row]:
    for name in ("gaussian", "collapsed", "non-finite rows"):
        z, codebook = (x.to(setting.device) for x in ADVERSARIES[name](*setting.size((1000, 333, 64), (20, 9, 6))))
        held = z.clone().requires_grad_()
        step = quantization(held, codebook.clone().requires_grad_(), "triton")
        same = repeats_as_graph(setting, step, lambda held=held, z=z: held.copy_(z.flip(0)))
        yield {"what": f"a CUDA graph repeats the bits of {name}", "ok": same}


def _attacked(setting: Setting) -> Iterator[Row]:
    minutes, seed = setting.size((min(0.5, setting.left() / 600), 1), (0.03, 4))
    *_, last = attack(minutes, ["triton"], seed=seed, device=str(setting.device))
    failure = None if last.failure is None else str(last.failure)
    yield {"what": "random attack", "ok": failure is None, "rows": last.rows, "failure": failure}
