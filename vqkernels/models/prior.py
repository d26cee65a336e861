"""What the priors of code grids share: labels, bits per code, and ancestral sampling."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.models.ancestral_sampling import Options, check_options, evaluating, plain_sample, start_codes


class CodePrior(nn.Module):
    """Autoregressive model of code grids, p(codes) = prod_i p(code_i | codes before i in raster order, label).

    A subclass gives `forward(codes, labels, ...)`, which begins with `_prepare`, and its cached sampler.

    Args:
        num_codes: K, the number of values that a code takes.
        channels: width of the embedding of a code.
        num_classes: number of labels; None for an unconditional prior.
        label_dropout: probability of training a grid without its label.
        sizes: other arguments that must be at least 1, by name.

    Raises:
        ValueError: an argument is out of range.
    """

    _cached_sample: ClassVar[Callable[..., Tensor]]  # of the model, codes, noise, labels, options, and its inputs

    def __init__(
        self, num_codes: int, channels: int, num_classes: int | None, label_dropout: float, **sizes: int
    ) -> None:
        classes = 1 if num_classes is None else num_classes
        for name, value in dict(num_codes=num_codes, hidden_channels=channels, num_classes=classes, **sizes).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, but is {value}")
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout must be at least 0 and less than 1, but is {label_dropout}")
        if label_dropout > 0 and num_classes is None:
            raise ValueError("label_dropout needs labels, but num_classes is None")
        super().__init__()
        self.num_codes, self.num_classes, self.label_dropout = num_codes, num_classes, label_dropout
        self.embedding = nn.Embedding(num_codes, channels)

    def bits_per_code(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean -log2 p of a code, for each grid: (B,) of codes (B, H, W). It is differentiable."""
        return bits_per_code(self(codes, labels), codes)

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, int, int],
        *,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        known: Tensor | None = None,
        generator: torch.Generator | None = None,
        cached: bool = True,
        chunk: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw codes (B, H, W) int64 in raster order, always without dropout.

        What a later code needs of the earlier ones is kept, so that each is computed once. The randomness is one
        uniform number (B, H, W) float64 for each code, drawn from the generator at the start.

        Args:
            shape: (B, H, W).
            labels: (B,), for a class-conditional prior.
            temperature: the logits are divided by it.
            top_k: draw among the k most likely codes only.
            top_p: draw among the fewest most likely codes whose probability reaches p (nucleus sampling).
            guidance: 1 draws from the prior given the label, 0 from the prior without it, more than 1 goes further
                towards the label: logits = without + guidance * (with - without). Needs `label_dropout`.
            known: (B, H, W) int64, codes to keep, and -1 where one is to be drawn given those before it.
            generator: source of randomness, on the model's device.
            cached: False runs a full forward pass for every code instead: the specification, for tests and benchmarks.
            chunk: grids sampled together, which bounds the memory; None chooses. The noise of a grid does not depend
                on it.
            progress: show a bar, where tqdm is installed.

        Raises:
            ValueError: the grid is too large for the model, or labels, known or an option are out of range.
        """
        options = check_options(self, temperature, top_k, top_p, guidance, chunk, progress)
        return self._draw(start_codes(self, shape, known), labels, options, generator, cached)

    def _draw(
        self, codes: Tensor, labels: Tensor | None, options: Options, generator: Any, cached: bool, **inputs: Any
    ) -> Tensor:
        """Codes (B, H, W) drawn where they are -1; `inputs` are the other arguments of `forward`."""
        self._check_grid(codes.shape, **inputs)
        check_labels(self, labels, len(codes))
        noise = torch.rand(codes.shape, dtype=torch.float64, device=codes.device, generator=generator)
        if cached:
            return self._cached_sample(self, codes, noise, labels, options, **inputs)
        with evaluating(self):
            return plain_sample(partial(self, **inputs), codes, noise, labels, options)

    def _check_grid(self, shape: torch.Size, **inputs: Any) -> None:
        """Raise ValueError unless the model takes grids of this shape (B, H, W), and other inputs of `forward`."""
        raise NotImplementedError

    def _prepare(self, codes: Tensor, labels: Tensor | None) -> Tensor | None:
        """Checks the inputs of `forward`; returns the labels, in training some of them dropped (-1)."""
        if codes.ndim != 3:
            raise ValueError(f"codes must be (B, H, W), but have shape {tuple(codes.shape)}")
        check_labels(self, labels, codes.shape[0])
        if labels is not None and self.training and self.label_dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.label_dropout
            labels = labels.masked_fill(dropped, -1)
        return labels


def bits_per_code(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean -log2 p of a code, (B,), from logits (B, K, H, W) of codes (B, H, W)."""
    return F.cross_entropy(logits, codes, reduction="none").mean((1, 2)) / math.log(2)


def check_labels(model: CodePrior, labels: Tensor | None, batch: int) -> None:
    """Raise ValueError unless labels are (batch,) and in range, or None for a prior without classes.

    With `label_dropout`, -1 means no label. The range is checked on the CPU alone.
    """
    if labels is None:
        if model.num_classes is not None:
            raise ValueError(f"labels are needed: this prior is conditional on {model.num_classes} classes")
    elif model.num_classes is None:
        raise ValueError("labels are not expected: this prior was built with num_classes=None")
    elif labels.shape != (batch,):
        raise ValueError(f"labels must be ({batch},), one per grid of codes, but have shape {tuple(labels.shape)}")
    elif labels.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to wait
        least = -1 if model.label_dropout > 0 else 0
        outside = labels[(labels < least) | (labels >= model.num_classes)].tolist()
        if outside:
            raise ValueError(f"labels must be in [{least}, {model.num_classes - 1}], but one is {outside[0]}")
