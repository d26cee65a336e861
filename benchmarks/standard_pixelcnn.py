"""The PixelCNN priors that PyTorch repositories train and sample, stated here to measure against.

`StandardPixelCNN` computes what the GatedPixelCNN of the widespread VQ-VAE repository computes, under the names of its
checkpoints: kernels of the mask's upper half, cropped outputs, and in the first layer a row and a column of weights
that every forward sets to zero. Its `generate` runs a full forward pass for every code. `MaskedPixelCNN` is the
textbook form: full square kernels, multiplied by their masks in every forward.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _gate(x: Tensor) -> Tensor:
    content, gate = x.chunk(2, dim=1)
    return torch.tanh(content) * torch.sigmoid(gate)


class StandardLayer(nn.Module):
    """A gated layer; one class bias for both stacks."""

    def __init__(self, first: bool, dim: int, kernel: int, classes: int) -> None:
        super().__init__()
        self.first, half = first, kernel // 2
        self.class_cond_embedding = nn.Embedding(classes, 2 * dim)
        self.vert_stack = nn.Conv2d(dim, 2 * dim, (half + 1, kernel), padding=(half, half))
        self.vert_to_horiz = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.horiz_stack = nn.Conv2d(dim, 2 * dim, (1, half + 1), padding=(0, half))
        self.horiz_resid = nn.Conv2d(dim, dim, 1)

    def forward(self, vertical: Tensor, horizontal: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:
            self.vert_stack.weight.data[:, :, -1].zero_()
            self.horiz_stack.weight.data[:, :, :, -1].zero_()
        height, width = vertical.shape[2:]
        bias = self.class_cond_embedding(labels)[:, :, None, None]
        above = self.vert_stack(vertical)[:, :, :height]
        left = self.horiz_stack(horizontal)[:, :, :, :width]
        result = self.horiz_resid(_gate(self.vert_to_horiz(above) + left + bias))
        return _gate(above + bias), result if self.first else result + horizontal


class StandardPixelCNN(nn.Module):
    """Embedding, gated layers, two 1x1 convolutions; always conditional on a class."""

    def __init__(self, codes: int = 512, dim: int = 64, layers: int = 15, classes: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        self.layers = nn.ModuleList(StandardLayer(i == 0, dim, 3 if i else 7, classes) for i in range(layers))
        self.output_conv = nn.Sequential(nn.Conv2d(dim, 512, 1), nn.ReLU(True), nn.Conv2d(512, codes, 1))

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        vertical = horizontal = self.embedding(codes).permute(0, 3, 1, 2)
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, labels)
        return self.output_conv(horizontal)

    def generate(self, labels: Tensor, shape: tuple[int, int], positions: int | None = None) -> Tensor:
        """Codes (B, H, W); `positions` ends the loop early, to measure what one costs."""
        height, width = shape
        codes = torch.zeros(len(labels), height, width, dtype=torch.int64)
        for position in range(height * width if positions is None else positions):
            row, column = divmod(position, width)
            probabilities = F.softmax(self(codes, labels)[:, :, row, column], -1)
            codes[:, row, column] = probabilities.multinomial(1).squeeze(1)
        return codes


class MaskedConvolution(nn.Conv2d):
    """A convolution with a full kernel whose weights are multiplied by a mask in every forward."""

    def __init__(self, inputs: int, outputs: int, mask: Tensor) -> None:
        height, width = mask.shape
        super().__init__(inputs, outputs, (height, width), padding=(height // 2, width // 2))
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class MaskedLayer(nn.Module):
    """The gated layer of `vqkernels.models.pixelcnn` with full kernels."""

    def __init__(self, first: bool, dim: int, kernel: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, half = first, kernel // 2
        square, row = torch.zeros(kernel, kernel), torch.zeros(1, kernel)
        square[: half + (not first)] = 1
        row[:, : half + (not first)] = 1
        self.vertical = MaskedConvolution(dim, 2 * dim, square)
        self.horizontal = MaskedConvolution(dim, 2 * dim, row)
        self.vertical_to_horizontal = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.output = nn.Conv2d(dim, dim, 1)
        self.class_bias = nn.Embedding(classes, 4 * dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        above = self.vertical(vertical)
        left = self.horizontal(horizontal) + self.vertical_to_horizontal(above)
        vertical_bias, horizontal_bias = self.class_bias(labels)[:, :, None, None].chunk(2, dim=1)
        result = self.output(self.dropout(_gate(left + horizontal_bias)))
        return _gate(above + vertical_bias), result if self.first else result + horizontal


class MaskedPixelCNN(nn.Module):
    """`vqkernels.models.PixelCNN` with full, masked kernels: the same function of the weights that a mask keeps."""

    def __init__(self, codes: int, dim: int, layers: int, classes: int, head: int = 512, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        self.layers = nn.ModuleList(MaskedLayer(i == 0, dim, 3 if i else 7, classes, dropout) for i in range(layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(dim, head, 1), nn.ReLU(), nn.Conv2d(head, codes, 1))

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        vertical = horizontal = self.embedding(codes).permute(0, 3, 1, 2)
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, labels)
        return self.head(horizontal)

    def load_cropped(self, state: dict[str, Tensor]) -> None:
        """Takes the weights of a `PixelCNN`; the masked taps keep theirs."""
        own = self.state_dict()
        for name, value in state.items():
            own[name][tuple(slice(size) for size in value.shape)] = value
