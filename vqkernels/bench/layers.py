"""The contenders of a training step: forward, backward with an incoming gradient, and the codebook's own update.

All start from the same codes. A codebook trained by gradient is updated by SGD without momentum, the cheapest update.
A codebook trained by moving averages updates itself. The incoming gradient is random.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.nn import VectorQuantizer
from vqkernels.nn.ema import ema_update_

# One step on rows (N, D); returns the indices (N,) of its forward.
Step = Callable[[], Tensor]
Forward = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # rows -> quantized, indices, loss


@dataclass(frozen=True)
class Layer:
    """A named contender of the training step."""

    name: str
    computes: str
    build: Callable[[Tensor], tuple[Forward, list[Tensor]]]  # codebook -> forward, parameters to update
    module: str = "torch"
    package: str = ""
    ours: bool = False
    matrices: int = 0  # as in `peers.Peer`

    def prepare(self, z: Tensor, codebook: Tensor) -> Step:
        forward, parameters = self.build(codebook.clone())
        rows = z.detach().clone().requires_grad_()
        incoming = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z.device) / z.numel()
        optimizer = torch.optim.SGD(parameters, lr=1e-3) if parameters else None

        def step() -> Tensor:
            rows.grad = None
            if optimizer is not None:
                optimizer.zero_grad()
            quantized, indices, loss = forward(rows)
            if loss.requires_grad:
                torch.autograd.backward([quantized, loss], [incoming.view_as(quantized), None])
            else:
                quantized.backward(incoming.view_as(quantized))
            if optimizer is not None:
                optimizer.step()
            return indices.reshape(-1)

        return step


class OneHotQuantizer(nn.Module):
    """The layer of many tutorials: all distances, a one-hot matrix, and its product with the codebook.

    Arguments and results are those of `vqkernels.nn.VectorQuantizer` with the same `beta`, `channel_dim` and
    `ema_decay`. With moving averages a second product with the one-hot matrix gives the sums of the rows of each code.
    """

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor

    def __init__(
        self, codebook: Tensor, beta: float = 0.25, *, channel_dim: int = 1, ema_decay: float | None = None
    ) -> None:
        super().__init__()
        self.beta, self.channel_dim, self.ema_decay = beta, channel_dim, ema_decay
        if ema_decay is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("ema_counts", torch.ones(len(codebook)))
            self.register_buffer("ema_sums", codebook.clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        channels_last = z.movedim(self.channel_dim, -1).contiguous()
        rows = channels_last.view(-1, self.codebook.shape[1])
        squares = rows.square().sum(1, keepdim=True) + self.codebook.square().sum(1)
        distances = squares - 2 * rows @ self.codebook.T
        indices = distances.argmin(1)
        one_hot = torch.zeros_like(distances).scatter_(1, indices[:, None], 1)
        codes = (one_hot @ self.codebook).view(channels_last.shape)
        loss = self.beta * F.mse_loss(channels_last, codes.detach())
        if self.ema_decay is None:
            loss = loss + F.mse_loss(codes, channels_last.detach())
        elif self.training:
            with torch.no_grad():
                counts, sums = one_hot.sum(0), one_hot.T @ rows
                ema_update_(self.codebook, self.ema_counts, self.ema_sums, counts, sums, self.ema_decay)
        quantized = channels_last + (codes - channels_last).detach()
        return quantized.movedim(-1, self.channel_dim), indices.view(channels_last.shape[:-1]), loss


def ours_trained(ema_decay: float | None, backend: str = "auto") -> Layer:
    """Our layer, its codebook trained by moving averages, or by gradient without `ema_decay`."""

    def build(codebook: Tensor) -> tuple[Forward, list[Tensor]]:
        layer = VectorQuantizer(codebook.shape[1], len(codebook), ema_decay=ema_decay, backend=backend)
        layer.to(codebook.device).codebook.data.copy_(codebook)
        return layer, list(layer.parameters())

    if ema_decay is None:
        return Layer("vqkernels", "codebook loss and SGD", build, "vqkernels", ours=True)
    return Layer("vqkernels EMA", "codebook by moving averages", build, "vqkernels", ours=True)


def _lucidrains(learnable: bool) -> Callable[[Tensor], tuple[Forward, list[Tensor]]]:
    def build(codebook: Tensor) -> tuple[Forward, list[Tensor]]:
        from vector_quantize_pytorch import VectorQuantize

        options = {"learnable_codebook": True, "ema_update": False} if learnable else {"decay": 0.99}
        layer = VectorQuantize(codebook.shape[1], len(codebook), rotation_trick=False, **options).to(codebook.device)
        layer._codebook.embed.data.copy_(codebook[None])
        if not learnable:
            layer._codebook.embed_avg.data.copy_(codebook[None])

        def forward(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            quantized, indices, loss = layer(rows[None])
            return quantized[0], indices[0], loss

        return forward, list(layer.parameters())

    return build


def _diffusers(codebook: Tensor) -> tuple[Forward, list[Tensor]]:
    from diffusers.models.autoencoders.vae import VectorQuantizer as Theirs

    layer = Theirs(len(codebook), codebook.shape[1], beta=0.25, legacy=False)
    layer.embedding.weight.data.copy_(codebook)

    def forward(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Images of one column, already channels-last in memory, so that the layer's permutation costs nothing.
        quantized, loss, (_, _, indices) = layer(rows[None, :, None, :].permute(0, 3, 1, 2))
        return quantized.permute(0, 2, 3, 1).reshape(rows.shape), indices, loss

    return forward, list(layer.parameters())


def _one_hot(codebook: Tensor) -> tuple[Forward, list[Tensor]]:
    layer = OneHotQuantizer(codebook)
    return layer, list(layer.parameters())


_LUCIDRAINS = ("vector_quantize_pytorch", "vector-quantize-pytorch")

TRAINING: tuple[Layer, ...] = (
    ours_trained(0.99),
    ours_trained(None),
    Layer("lucidrains EMA", "codebook by moving averages, no rotation", _lucidrains(False), *_LUCIDRAINS, matrices=7),
    Layer("lucidrains learnable", "codebook loss and SGD, no rotation", _lucidrains(True), *_LUCIDRAINS, matrices=7),
    Layer(
        "diffusers", "codebook loss and SGD", _diffusers, "diffusers.models.autoencoders.vae", "diffusers", matrices=1
    ),
    Layer("one-hot layer", "the usual tutorial's layer, codebook loss and SGD", _one_hot, matrices=4),
)
