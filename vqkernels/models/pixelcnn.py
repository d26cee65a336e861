"""Gated PixelCNN of van den Oord et al., "Conditional Image Generation with PixelCNN Decoders" (2016).

Two stacks of gated convolutions: the vertical stack at row i sees the rows above i, the horizontal stack at (i, j)
sees the pixels left of j in row i and, through a 1x1 convolution, the vertical stack. Together they see every earlier
pixel in raster order and no other (no blind spot). Causality comes from the shape of the kernels: only the taps that a
mask would keep exist, and padding shifts them into place, so no weight is ever masked.

`GatedLayer` and `PixelCNN.stacks` are the plain form. On the CPU, in float32 and float64, `PixelCNN.forward` computes
the same by the fused layers of `pixelcnn_training.py`, about as exactly and in less time.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.models import pixelcnn_sampling, pixelcnn_training
from vqkernels.models.ancestral_sampling import check_options, start_codes
from vqkernels.models.prior import CodePrior, bits_per_code


class GatedLayer(nn.Module):
    """One layer of figure 2 of the paper.

    Args:
        channels: width of both stacks.
        kernel_size: width of the mask's square, odd.
        first: mask A (the current pixel, and for the vertical stack the current row, stay unseen; no residual);
            otherwise mask B.
        num_classes: number of classes of the conditional bias; None for an unconditional layer.
        condition_channels: channels of a spatial condition (equation 4); None for none.
        dropout: probability of dropping a gated feature.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        first: bool,
        num_classes: int | None,
        condition_channels: int | None = None,
        dropout: float,
    ) -> None:
        super().__init__()
        reach = kernel_size // 2
        taps = reach if first else reach + 1  # rows of the vertical kernel, columns of the horizontal one
        self.residual = not first
        # (left, right, top, bottom); -1 drops the last row or column, which shifts the output by one
        self.vertical_padding = (reach, reach, reach, taps - reach - 1)
        self.horizontal_padding = (reach, taps - reach - 1, 0, 0)
        self.vertical = nn.Conv2d(channels, 2 * channels, (taps, kernel_size))
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, taps))
        self.vertical_to_horizontal = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.output = nn.Conv2d(channels, channels, 1)
        self.class_bias = None if num_classes is None else nn.Embedding(num_classes, 4 * channels)
        self.condition = (
            None if condition_channels is None else nn.Conv2d(condition_channels, 4 * channels, 1, bias=False)
        )
        self.dropout = nn.Dropout(dropout)

    def label_bias(self, labels: Tensor) -> Tensor:
        """What labels (B,) add to the gates of both stacks, (B, 4C); a label of -1 adds nothing."""
        assert self.class_bias is not None
        return self.class_bias(labels.clamp_min(0)) * (labels >= 0)[:, None]

    def forward(
        self, vertical: Tensor, horizontal: Tensor, labels: Tensor | None, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both stacks (B, C, H, W), labels (B,) and a condition (B, C', H, W) in, both stacks out."""
        above = self.vertical(F.pad(vertical, self.vertical_padding))  # [B, 2C, H, W]
        left = self.vertical_to_horizontal(above)
        left += self.horizontal(F.pad(horizontal, self.horizontal_padding))  # in place: no gradient needs a term of it
        if self.class_bias is not None and labels is not None:
            vertical_bias, horizontal_bias = self.label_bias(labels)[:, :, None, None].chunk(2, dim=1)
            above = above + vertical_bias
            left += horizontal_bias
        if self.condition is not None:
            vertical_bias, horizontal_bias = self.condition(condition).chunk(2, dim=1)
            above = above + vertical_bias
            left += horizontal_bias
        result = self.output(self.dropout(_gate(left)))
        return _gate(above), horizontal + result if self.residual else result


class PixelCNN(CodePrior):
    """Autoregressive model of code grids, p(codes) = prod_i p(code_i | codes before i in raster order, label).

    Args:
        num_codes: K, the number of values that a code takes.
        hidden_channels: width of both stacks.
        num_layers: number of gated layers; the first has mask A, the others mask B.
        num_classes: number of labels; None for an unconditional prior.
        condition_channels: channels of a condition with the grid's height and width, such as an upsampled grid of
            coarser codes; None for none.
        kernel_size: width of the masks after the first layer, odd.
        first_kernel_size: width of the first layer's mask, odd.
        head_channels: width of the hidden 1x1 convolution before the logits.
        head_activation: whether a ReLU precedes that convolution.
        dropout: probability of dropping a gated feature in training.
        label_dropout: probability of training a grid without its label, for classifier-free guidance (Ho and Salimans
            2022).

    Raises:
        ValueError: a size is out of range.
    """

    _cached_sample = staticmethod(pixelcnn_sampling.cached_sample)

    def __init__(
        self,
        num_codes: int,
        *,
        hidden_channels: int = 64,
        num_layers: int = 15,
        num_classes: int | None = None,
        condition_channels: int | None = None,
        kernel_size: int = 3,
        first_kernel_size: int = 7,
        head_channels: int = 512,
        head_activation: bool = True,
        dropout: float = 0.0,
        label_dropout: float = 0.0,
    ) -> None:
        for name, value in (("kernel_size", kernel_size), ("first_kernel_size", first_kernel_size)):
            if value < 3 or value % 2 == 0:
                raise ValueError(f"{name} must be odd and at least 3, but is {value}")
        super().__init__(
            num_codes,
            hidden_channels,
            num_classes,
            label_dropout,
            num_layers=num_layers,
            condition_channels=1 if condition_channels is None else condition_channels,
            head_channels=head_channels,
        )
        self.condition_channels = condition_channels
        self.layers = nn.ModuleList(
            GatedLayer(
                hidden_channels,
                first_kernel_size if layer == 0 else kernel_size,
                first=layer == 0,
                num_classes=num_classes,
                condition_channels=condition_channels,
                dropout=dropout,
            )
            for layer in range(num_layers)
        )
        self.head = nn.Sequential(
            nn.ReLU() if head_activation else nn.Identity(),
            nn.Conv2d(hidden_channels, head_channels, 1),
            nn.ReLU(),
            nn.Conv2d(head_channels, num_codes, 1),
        )

    def forward(self, codes: Tensor, labels: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Logits (B, K, H, W) of codes (B, H, W) int64 given labels (B,); those at a position depend on earlier ones.

        On the CPU they can be differentiated once, and not twice.

        Args:
            labels: for a class-conditional prior; with `label_dropout`, -1 means no label.
            condition: (B, condition_channels, H, W), for a prior with a spatial condition.

        Raises:
            ValueError: codes or condition have the wrong shape, or labels are missing, not expected or (on the CPU) out
                of range.
        """
        labels = self._prepare(codes, labels)
        self._check_grid(codes.shape, condition=condition)
        own = type(self).stacks is PixelCNN.stacks and all(type(x).forward is GatedLayer.forward for x in self.layers)
        if own and pixelcnn_training.serves(self, codes, condition):
            return pixelcnn_training.logits(self, codes, labels, condition)
        _, horizontal = self.stacks(self.embedding(codes).permute(0, 3, 1, 2), labels, condition)
        return self.head(horizontal)

    def stacks(
        self, embedded: Tensor, labels: Tensor | None = None, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Last features of the vertical and the horizontal stack, (B, C, H, W) each, of embedded codes (B, C, H, W)."""
        vertical = horizontal = embedded
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, labels, condition)
        return vertical, horizontal

    def bits_per_code(self, codes: Tensor, labels: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Mean -log2 p of a code, for each grid: (B,) of codes (B, H, W). It is differentiable."""
        return bits_per_code(self(codes, labels, condition), codes)

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, int, int],
        *,
        labels: Tensor | None = None,
        condition: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        known: Tensor | None = None,
        generator: torch.Generator | None = None,
        cached: bool = True,
        chunk: int | None = None,
        backend: str = "auto",
        progress: bool = False,
    ) -> Tensor:
        """Draw codes (B, H, W) int64 in raster order, always without dropout; see `CodePrior.sample`.

        A grid costs about as much as one forward pass.

        Args:
            condition: (B, condition_channels, H, W), for a prior with a spatial condition.
            backend: who computes the cached steps; see `vqkernels info`.
            Everything else as in `CodePrior.sample`.

        Raises:
            ValueError: labels, condition, known or an option are out of range.
        """
        options = check_options(self, temperature, top_k, top_p, guidance, chunk, progress, backend)
        codes = start_codes(self, shape, known)
        return self._draw(codes, labels, options, generator, cached, condition=condition)

    def _check_grid(self, shape: torch.Size, **inputs: Any) -> None:
        condition: Tensor | None = inputs["condition"]
        if (condition is None) != (self.condition_channels is None):
            raise ValueError(
                "condition is not expected: this prior was built with condition_channels=None"
                if condition is not None
                else f"a condition of {self.condition_channels} channels is needed"
            )
        if condition is not None:
            expected = (shape[0], self.condition_channels, *shape[1:])
            if tuple(condition.shape) != expected:
                raise ValueError(f"condition must have shape {expected}, but has {tuple(condition.shape)}")


def _gate(features: Tensor) -> Tensor:
    """tanh(a) * sigmoid(b) of features (B, 2C, H, W) = [a, b], equation 2 of the paper."""
    content, gate = features.chunk(2, dim=1)
    return torch.tanh(content) * torch.sigmoid(gate)
