"""The contenders of the entropy loss: both entropies, and their gradients with respect to rows and codes.

A call returns both entropies, `(2,)`, and leaves the gradients in its leaves. At this temperature hardly any
probability of the Gaussian rows is 0, so no contender can skip any.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vqkernels import reference
from vqkernels.ops.entropy import entropy_loss

from .peers import Call, Peer

TEMPERATURE = 1.0
PLAIN = "plain PyTorch"
_ROWS = 256  # that the reference computes
_TOLERANCE = 1e-4  # of a float32 gradient, relative to its largest element

Entropies = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def plain(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The usual code: a matrix of logits, its softmax and its log-softmax."""
    squares = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
    logits = -(squares - 2 * z @ codebook.T) / TEMPERATURE
    probabilities, logarithms = logits.softmax(1), logits.log_softmax(1)
    mean = probabilities.mean(0)
    return -(probabilities * logarithms).sum(1).mean(), -(mean * mean.clamp_min(1e-30).log()).sum()


def _step(entropies: Entropies, z: Tensor, codebook: Tensor) -> Call:
    rows, codes = z.clone().requires_grad_(), codebook.clone().requires_grad_()

    def step() -> Tensor:
        rows.grad = codes.grad = None
        sample, whole = entropies(rows, codes)
        (sample - whole).backward()
        return torch.stack([sample.detach(), whole.detach()])

    return step


def _entropy_loss(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    return entropy_loss(z, codebook, TEMPERATURE)


def _ours(z: Tensor, codebook: Tensor) -> Call:
    return _step(_entropy_loss, z, codebook)


def _plain(z: Tensor, codebook: Tensor) -> Call:
    return _step(plain, z, codebook)


def _compiled(z: Tensor, codebook: Tensor) -> Call:
    torch._dynamo.reset()
    return _step(torch.compile(plain, dynamic=False), z, codebook)


def mistake(z: Tensor, codebook: Tensor) -> str | None:
    """How our entropies or gradients on the first rows differ from the reference's in float64, or None."""
    answers = []
    for function, dtype in ((_entropy_loss, torch.float32), (_expected, torch.float64)):
        rows, codes = (x.to(dtype).requires_grad_() for x in (z[:_ROWS], codebook))
        sample, whole = function(rows, codes)
        gradients = torch.autograd.grad(sample - whole, (rows, codes))
        answers.append([sample.detach(), whole.detach(), *gradients])
    names = ("sample entropy", "codebook entropy", "gradient of z", "gradient of the codebook")
    for name, ours, exact in zip(names, *answers, strict=True):
        error = float((ours.double() - exact).abs().max() / exact.abs().max())
        if not error <= _TOLERANCE:
            return f"the {name} is off by {error:.1e} of its largest element"
    return None


def _expected(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    return reference.entropy_loss(z, codebook, TEMPERATURE)


ENTROPY: tuple[Peer, ...] = (
    Peer("vqkernels", "entropies and gradients", _ours, ours=True),
    Peer(PLAIN, "entropies and gradients by autograd", _plain, matrices=8),
    Peer("torch.compile of it", "the same, fused by a compiler", _compiled, slow_start=True, matrices=8),
)
