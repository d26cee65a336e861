"""The whole model as people write it, to measure against: same architecture, weights, seeds and losses as ours.

The VQ-VAE has the one-hot quantizer of the tutorials; the PixelCNN has full kernels that every forward multiplies by a
mask; training is eager, in float32 and torch's default layout, with Adam as it comes; sampling runs the whole PixelCNN
for every code. Everything takes its first weights from our models, so that losses can be compared before times.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.standard_pixelcnn import MaskedPixelCNN
from vqkernels.bench.layers import OneHotQuantizer
from vqkernels.models import VQVAE, PixelCNN
from vqkernels.training.acceleration import Speed, SpeedConfig, place

Step = Callable[[], Tensor]  # a training step; returns its loss


def usual_vqvae(model: VQVAE) -> VQVAE:
    """A copy with the one-hot quantizer in torch's default layout; moving averages begin at zero, as ours do."""
    usual, ours = copy.deepcopy(model).to(memory_format=torch.contiguous_format), model.quantizer  # type: ignore[call-overload]
    codes = ours.codebook.detach().clone()
    quantizer = OneHotQuantizer(codes, ours.beta, ema_decay=ours.ema_decay).to(codes.device)
    if ours.ema_decay is not None:
        quantizer.ema_counts.zero_()
        quantizer.ema_sums.zero_()
    usual.quantizer = quantizer  # type: ignore[assignment]
    return usual


def usual_prior(prior: PixelCNN) -> MaskedPixelCNN:
    """The masked PixelCNN with the same weights."""
    head, dim = prior.head[1].out_channels, prior.embedding.embedding_dim  # type: ignore[union-attr]
    dropout = prior.layers[0].dropout.p  # type: ignore[union-attr]
    assert prior.num_classes is not None
    usual = MaskedPixelCNN(
        prior.num_codes,
        dim,
        len(prior.layers),
        prior.num_classes,
        head,  # type: ignore[arg-type]
        dropout,  # type: ignore[arg-type]
    ).to(prior.embedding.weight.device)
    usual.load_cropped(prior.state_dict())
    return usual


def usual_step(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], optimizer: torch.optim.Optimizer | None = None
) -> Step:
    """Forward, backward, Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4) if optimizer is None else optimizer

    def step() -> Tensor:
        value = loss(model)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def our_step(model: nn.Module, loss: Callable[[nn.Module], Tensor], speed: Speed) -> Step:
    """The same as `vqkernels train` does it."""
    if isinstance(model, VQVAE):
        place(model, speed.config, speed.device)
    optimizer = speed.optimizer(model.parameters(), 2e-4)
    forward = speed.forward(model)

    def step() -> Tensor:
        speed.begin_step()
        with speed.autocast():
            value = loss(forward)
        speed.learn(value, optimizer)
        return value.detach()

    return step


def steps(
    model: nn.Module,
    usual: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    configs: dict[str, SpeedConfig],
    device: torch.device,
) -> dict[str, Step]:
    """The usual model's training step, and one of a copy of ours for each configuration, by name."""
    ours = {name: our_step(copy.deepcopy(model), loss, Speed(config, device)) for name, config in configs.items()}
    return {"usual": usual_step(usual.train(), loss), **ours}


def reconstruction_loss(images: Tensor) -> Callable[[nn.Module], Tensor]:
    """Equation 3 of the paper on a batch of images."""
    return lambda model: model(images)[2].total


def code_loss(codes: Tensor, labels: Tensor) -> Callable[[nn.Module], Tensor]:
    """Cross entropy of a batch of grids of codes."""
    return lambda model: F.cross_entropy(model(codes, labels).float(), codes)


@torch.no_grad()
def plain_sample(
    prior: nn.Module, labels: Tensor, size: tuple[int, int], generator: torch.Generator | None = None
) -> Tensor:
    """Codes (B, h, w) for labels (B,): a full forward pass for every code."""
    codes = torch.zeros(len(labels), *size, dtype=torch.int64, device=labels.device)
    for row in range(size[0]):
        for column in range(size[1]):
            probabilities = F.softmax(prior(codes, labels)[:, :, row, column], 1)
            codes[:, row, column] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    return codes


@torch.no_grad()
def plain_decode(model: VQVAE, codes: Tensor) -> Tensor:
    """Images of codes (B, h, w): the one-hot matrix times the codebook, then the decoder."""
    codebook = model.quantizer.codebook
    one_hot = F.one_hot(codes, len(codebook)).to(codebook.dtype)
    return model.decoder((one_hot @ codebook).movedim(-1, 1)).clamp(-1, 1)


def check_losses(contenders: dict[str, Step], what: str, tolerances: dict[str, float], steps: int = 3) -> None:
    """Raise SystemExit unless everyone has the usual implementation's loss in the first steps.

    Args:
        contenders: steps of models with equal weights, on the same batch; one is called "usual".
        what: named in the message.
        tolerances: relative differences that are allowed; 1e-4 where none is given.
    """
    losses = {name: [float(step()) for _ in range(steps)] for name, step in contenders.items()}
    for name, values in losses.items():
        tolerance = tolerances.get(name, 1e-4)
        if any(abs(x - y) > tolerance * abs(y) for x, y in zip(values, losses["usual"], strict=True)):
            raise SystemExit(f"{what}: the losses of '{name}' are not the usual ones, {losses}: nothing is timed")
