"""Whole models on the GPU: a VQ-VAE step by backend, and the full model beside the usual implementation.

Losses of the full model are compared before anything is timed. Inductor's CPU code is no part of this: the rehearsal
only shows that the VQ-VAE's compiled step is one graph, and leaves the other compiled steps out.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.hardware.checks import Row
from benchmarks.hardware.setting import Setting
from benchmarks.usual_model import (
    Step,
    code_loss,
    plain_sample,
    reconstruction_loss,
    steps,
    usual_prior,
    usual_vqvae,
)
from vqkernels.models import VQVAE, PixelCNN
from vqkernels.training.acceleration import SpeedConfig

FLAGS = {
    "no flag": SpeedConfig(channels_last="off", fused_optimizer=False),
    "channels last": SpeedConfig(channels_last="on", fused_optimizer=False),
    "fused optimizer": SpeedConfig(channels_last="off"),
    "bfloat16": SpeedConfig(amp="bfloat16"),
    "bfloat16, channels last": SpeedConfig(channels_last="on", amp="bfloat16"),
    "float16": SpeedConfig(amp="float16"),
    "compiled": SpeedConfig(compile=True),
    "compiled, bfloat16, channels last": SpeedConfig(channels_last="on", amp="bfloat16", compile=True),
    "CUDA graphs": SpeedConfig(compile=True, cuda_graphs=True),
}
CLASSES = 10
TOLERANCE = {"off": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}  # of the first loss; convolutions may be TF32


def model(setting: Setting) -> Iterator[Row]:
    """A step of the VQ-VAE with each backend: as it is, under mixed precision, and compiled."""
    for codes in setting.size([512, 8192], [16]):
        images = torch.rand(*setting.size((128, 3, 64, 64), (1, 3, 8, 8)), device=setting.device)
        contenders: dict[str, Callable[[], Any]] = {}
        for backend in ("triton", "eager"):
            for mode in ("eager", "AMP", "compiled") if backend == "triton" else ("eager",):
                contenders[f"{mode}, backend {backend}"] = _step(setting, images, codes, backend, mode)
        row = {"what": "VQ-VAE training step", "images": list(images.shape), "K": codes}
        yield row | {"times": setting.times(contenders)}


def _step(setting: Setting, images: torch.Tensor, codes: int, backend: str, mode: str) -> Callable[[], Any]:
    """A training step of a fresh model: forward, backward, optimizer."""
    torch.manual_seed(0)
    hidden = setting.size(128, 8)
    network = VQVAE(3, hidden_channels=hidden, codebook_size=codes, ema_decay=0.99, backend=backend).to(setting.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, fused=not setting.dry)
    forward = network
    if mode == "compiled":
        forward = torch.compile(network, fullgraph=True, backend=setting.size("inductor", "eager"))
    precision = torch.autocast(setting.device.type, torch.bfloat16) if mode == "AMP" else contextlib.nullcontext()

    def step() -> None:
        with precision:
            loss = forward(images)[2].total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def full_model(setting: Setting) -> Iterator[Row]:
    """Rows of step times, one per codebook size, then of the prior and of sampling."""
    flags = {name: x for name, x in FLAGS.items() if not (setting.dry and x.compile)}
    for size in setting.size([8192, 512], [16]):
        torch.manual_seed(0)
        vqvae = VQVAE(
            3,
            hidden_channels=setting.size(128, 8),
            code_dim=setting.size(64, 4),
            codebook_size=size,
            backend=setting.size("triton", "auto"),  # in the rehearsal the same kernels are the CPU's own
        )
        torch.nn.init.normal_(vqvae.quantizer.codebook, std=0.1)
        vqvae = vqvae.to(setting.device)
        images = torch.rand(*setting.size((128, 3, 64, 64), (1, 3, 8, 8)), device=setting.device) * 2 - 1
        contenders = steps(vqvae, usual_vqvae(vqvae), reconstruction_loss(images), flags, setting.device)
        row = {"images": list(images.shape), "K": size}
        yield _row(setting, "full model: VQ-VAE training step", contenders, flags) | row
    torch.manual_seed(0)
    prior = PixelCNN(
        setting.size(512, 16),
        hidden_channels=setting.size(64, 8),
        num_layers=setting.size(15, 2),
        num_classes=CLASSES,
        head_channels=setting.size(512, 8),
    ).to(setting.device)
    grids, side = setting.size((64, 16), (2, 3))
    codes = torch.randint(prior.num_codes, (grids, side, side), device=setting.device)
    labels = torch.arange(grids, device=setting.device) % CLASSES
    contenders = steps(prior, usual_prior(prior), code_loss(codes, labels), flags, setting.device)
    yield _row(setting, "full model: prior training step", contenders, flags) | {"grids": list(codes.shape)}
    samplers: dict[str, Callable[[], Any]] = {
        "usual": partial(plain_sample, usual_prior(prior).eval(), labels, (side, side)),
        "ours": partial(prior.eval().sample, tuple(codes.shape), labels=labels),
    }
    yield {"what": "full model: sampling", "grids": list(codes.shape), "times": setting.times(samplers)}


def _row(setting: Setting, what: str, contenders: dict[str, Step], flags: dict[str, SpeedConfig]) -> Row:
    """First losses, whether they agree, and times where they do."""
    losses: dict[str, float | str] = {}
    for name, step in contenders.items():
        try:
            losses[name] = float(step())
        except Exception as error:  # reported, as in the times
            losses[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    usual = losses["usual"]
    wrong = [
        name
        for name, loss in losses.items()
        if isinstance(loss, float) and isinstance(usual, float) and name in flags
        if not abs(loss - usual) <= TOLERANCE[flags[name].amp] * usual
    ]
    if isinstance(usual, str) or wrong:
        return {"what": what, "ok": False, "losses": losses, "wrong": wrong}
    return {"what": what, "ok": True, "losses": losses, "times": setting.times(dict(contenders))}
