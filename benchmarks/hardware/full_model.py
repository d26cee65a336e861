"""The full model beside the usual implementation, on the GPU: training steps with every speed flag, and sampling.

Losses are compared before anything is timed. Compiled steps are left out of the rehearsal: inductor's CPU code is no
part of this, and that the step is one graph is rehearsed in model.py.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.hardware.setting import Setting
from benchmarks.hardware.timing import times
from benchmarks.usual_model import (
    Step,
    code_loss,
    our_step,
    plain_sample,
    reconstruction_loss,
    usual_prior,
    usual_step,
    usual_vqvae,
)
from vqkernels.models import VQVAE, PixelCNN
from vqkernels.training.acceleration import Speed, SpeedConfig

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


def full_model(setting: Setting) -> Iterator[dict[str, Any]]:
    """Rows of step times, one per codebook size, then of the prior and of sampling."""
    flags = {name: x for name, x in FLAGS.items() if not (setting.dry and x.compile)}
    for size in setting.size([8192, 512], [16]):
        torch.manual_seed(0)
        model = VQVAE(
            3,
            hidden_channels=setting.size(128, 8),
            code_dim=setting.size(64, 4),
            codebook_size=size,
            backend=setting.size("triton", "auto"),  # in the rehearsal the same kernels are the CPU's own
        )
        torch.nn.init.normal_(model.quantizer.codebook, std=0.1)
        model = model.to(setting.device)
        images = torch.rand(*setting.size((128, 3, 64, 64), (1, 3, 8, 8)), device=setting.device) * 2 - 1
        loss = reconstruction_loss(images)
        steps = {"usual": usual_step(usual_vqvae(model).train(), loss)}
        steps |= {n: our_step(copy.deepcopy(model), loss, Speed(x, setting.device)) for n, x in flags.items()}
        yield _row(setting, "full model: VQ-VAE training step", steps, flags) | {
            "images": list(images.shape),
            "K": size,
        }
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
    loss = code_loss(codes, labels)
    steps = {"usual": usual_step(usual_prior(prior).train(), loss)}
    steps |= {n: our_step(copy.deepcopy(prior), loss, Speed(x, setting.device)) for n, x in flags.items()}
    yield _row(setting, "full model: prior training step", steps, flags) | {"grids": list(codes.shape)}
    usual = usual_prior(prior).eval()
    contenders: dict[str, Callable[[], Any]] = {
        "usual": partial(plain_sample, usual, labels, (side, side)),
        "ours": partial(prior.eval().sample, tuple(codes.shape), labels=labels),
    }
    yield {"what": "full model: sampling", "grids": list(codes.shape), "times": times(setting, contenders)}


def _row(setting: Setting, what: str, steps: dict[str, Step], flags: dict[str, SpeedConfig]) -> dict[str, Any]:
    """First losses, whether they agree, and times where they do."""
    losses: dict[str, float | str] = {}
    for name, step in steps.items():
        try:
            losses[name] = float(step())
        except Exception as error:  # told, as in the times
            losses[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    usual = losses["usual"]
    if isinstance(usual, str):
        return {"what": what, "ok": False, "losses": losses}
    wrong = [
        name
        for name, value in losses.items()
        if name in flags and isinstance(value, float) and not abs(value - usual) <= TOLERANCE[flags[name].amp] * usual
    ]
    if wrong:
        return {"what": what, "ok": False, "losses": losses, "wrong": wrong}
    return {"what": what, "ok": True, "losses": losses, "times": times(setting, dict(steps))}
