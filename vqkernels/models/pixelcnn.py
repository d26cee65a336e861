"""Gated PixelCNN of van den Oord et al., "Conditional Image Generation with PixelCNN Decoders" (2016).

Two stacks of gated convolutions: the vertical stack at row i sees the rows above i, the horizontal stack at (i, j)
sees the pixels left of j in row i and, through a 1x1 convolution, the vertical stack. Together they see every earlier
pixel in raster order and no other (no blind spot). Causality comes from the shape of the kernels: only the taps that a
mask would keep exist, and padding shifts them into place, so no weight is ever masked.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GatedLayer(nn.Module):
    """One layer of figure 2 of the paper.

    Args:
        channels: width of both stacks.
        kernel_size: width of the mask's square, odd.
        first: mask A (the current pixel, and for the vertical stack the current row, stay unseen; no residual);
            otherwise mask B.
        num_classes: number of classes of the conditional bias; None for an unconditional layer.
        dropout: probability of dropping a gated feature.
    """

    def __init__(
        self, channels: int, kernel_size: int, *, first: bool, num_classes: int | None, dropout: float
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
        self.dropout = nn.Dropout(dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both stacks (B, C, H, W) and labels (B,) in, both stacks out."""
        above = self.vertical(F.pad(vertical, self.vertical_padding))  # [B, 2C, H, W]
        left = self.horizontal(F.pad(horizontal, self.horizontal_padding)) + self.vertical_to_horizontal(above)
        if self.class_bias is not None:
            vertical_bias, horizontal_bias = self.class_bias(labels)[:, :, None, None].chunk(2, dim=1)
            above, left = above + vertical_bias, left + horizontal_bias
        result = self.output(self.dropout(_gate(left)))
        return _gate(above), horizontal + result if self.residual else result


class PixelCNN(nn.Module):
    """Autoregressive model of code grids, p(codes) = prod_i p(code_i | codes before i in raster order, label).

    Args:
        num_codes: K, the number of values that a code takes.
        hidden_channels: width of both stacks.
        num_layers: number of gated layers; the first has mask A, the others mask B.
        num_classes: number of labels; None for an unconditional prior.
        kernel_size: width of the masks after the first layer, odd.
        first_kernel_size: width of the first layer's mask, odd.
        head_channels: width of the hidden 1x1 convolution before the logits.
        dropout: probability of dropping a gated feature in training.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        num_codes: int,
        *,
        hidden_channels: int = 64,
        num_layers: int = 15,
        num_classes: int | None = None,
        kernel_size: int = 3,
        first_kernel_size: int = 7,
        head_channels: int = 512,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_codes", num_codes),
            ("hidden_channels", hidden_channels),
            ("num_layers", num_layers),
            ("num_classes", 1 if num_classes is None else num_classes),
            ("head_channels", head_channels),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, but is {value}")
        for name, value in (("kernel_size", kernel_size), ("first_kernel_size", first_kernel_size)):
            if value < 3 or value % 2 == 0:
                raise ValueError(f"{name} must be odd and at least 3, but is {value}")
        self.num_codes = num_codes
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_codes, hidden_channels)
        self.layers = nn.ModuleList(
            GatedLayer(
                hidden_channels,
                first_kernel_size if layer == 0 else kernel_size,
                first=layer == 0,
                num_classes=num_classes,
                dropout=dropout,
            )
            for layer in range(num_layers)
        )
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv2d(hidden_channels, head_channels, 1), nn.ReLU(), nn.Conv2d(head_channels, num_codes, 1)
        )

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, K, H, W) of codes (B, H, W) int64 given labels (B,); those at a position depend on earlier ones.

        Raises:
            ValueError: codes have the wrong shape, or labels are missing, not expected or (on the CPU) out of range.
        """
        if codes.ndim != 3:
            raise ValueError(f"codes must be (B, H, W), but have shape {tuple(codes.shape)}")
        self._check_labels(labels, codes.shape[0])
        _, horizontal = self.stacks(self.embedding(codes).permute(0, 3, 1, 2), labels)
        return self.head(horizontal)

    def stacks(self, embedded: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Last features of the vertical and the horizontal stack, (B, C, H, W) each, of embedded codes (B, C, H, W)."""
        vertical = horizontal = embedded
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, labels)
        return vertical, horizontal

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, int, int],
        *,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw codes (B, H, W) int64 in raster order, always without dropout.

        Args:
            shape: (B, H, W).
            labels: (B,), for a class-conditional prior.
            temperature: the logits are divided by it.
            top_k: draw among the k most likely codes only.
            top_p: draw among the fewest most likely codes whose probability reaches p (nucleus sampling).
            generator: source of randomness, on the model's device.
            progress: show a bar (needs tqdm).

        Raises:
            ValueError: labels, temperature, top_k or top_p are out of range.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, but is {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, but is {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], but is {top_p}")
        batch, height, width = shape
        self._check_labels(labels, batch)
        positions = [(row, column) for row in range(height) for column in range(width)]
        codes = torch.zeros(shape, dtype=torch.int64, device=self.embedding.weight.device)
        training = self.training
        self.eval()
        try:
            for row, column in _bar(positions) if progress else positions:
                logits = self(codes[:, : row + 1], labels)[:, :, row, column]  # [B, K]
                probabilities = _truncate(torch.softmax(logits.double() / temperature, dim=-1), top_k, top_p)
                codes[:, row, column] = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        finally:
            self.train(training)
        return codes

    def _check_labels(self, labels: Tensor | None, batch: int) -> None:
        if labels is None:
            if self.num_classes is not None:
                raise ValueError(f"labels are needed: this prior is conditional on {self.num_classes} classes")
        elif self.num_classes is None:
            raise ValueError("labels are not expected: this prior was built with num_classes=None")
        elif labels.shape != (batch,):
            raise ValueError(f"labels must be ({batch},), one per grid of codes, but have shape {tuple(labels.shape)}")
        elif labels.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to wait
            outside = labels[(labels < 0) | (labels >= self.num_classes)].tolist()
            if outside:
                raise ValueError(f"labels must be in [0, {self.num_classes - 1}], but one is {outside[0]}")


def _gate(features: Tensor) -> Tensor:
    """tanh(a) * sigmoid(b) of features (B, 2C, H, W) = [a, b], equation 2 of the paper."""
    content, gate = features.chunk(2, dim=1)
    return torch.tanh(content) * torch.sigmoid(gate)


def _truncate(probabilities: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Zero the codes that top_k and top_p exclude, in probabilities (B, K); `multinomial` normalises the rest."""
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[:, top_k:] = 0
        ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    if top_p is not None:
        ranked[ranked.cumsum(dim=-1) - ranked >= top_p] = 0
    return torch.zeros_like(probabilities).scatter_(-1, order, ranked)


def _bar(positions: list[tuple[int, int]]) -> "list[tuple[int, int]]":
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("progress=True needs tqdm: pip install 'vqkernels[train]'", name="tqdm") from missing
    return tqdm(positions, desc="sampling", unit="code", leave=False)
