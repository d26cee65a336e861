"""One training step of the whole VQ-VAE: eager, under automatic mixed precision, and compiled, with each backend."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.hardware.setting import Setting
from benchmarks.hardware.timing import times
from vqkernels.models import VQVAE


def model(setting: Setting) -> Iterator[dict[str, Any]]:
    """Rows of step times, one per codebook size."""
    for codes in setting.size([512, 8192], [16]):
        images = torch.rand(*setting.size((128, 3, 64, 64), (1, 3, 8, 8)), device=setting.device)
        contenders: dict[str, Callable[[], Any]] = {}
        for backend in ("triton", "eager"):
            for mode in ("eager", "AMP", "compiled") if backend == "triton" else ("eager",):
                contenders[f"{mode}, backend {backend}"] = _step(setting, images, codes, backend, mode)
        row = {"what": "VQ-VAE training step", "images": list(images.shape), "K": codes}
        yield row | {"times": times(setting, contenders)}


def _step(setting: Setting, images: torch.Tensor, codes: int, backend: str, mode: str) -> Callable[[], Any]:
    """A training step of a fresh model: forward, backward, optimizer."""
    torch.manual_seed(0)
    hidden = setting.size(128, 8)
    network = VQVAE(3, hidden_channels=hidden, codebook_size=codes, ema_decay=0.99, backend=backend).to(setting.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, fused=not setting.dry)
    # inductor's CPU code is no part of this; the rehearsal shows that the step is one graph
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
