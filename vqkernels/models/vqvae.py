"""The VQ-VAE of van den Oord et al., "Neural Discrete Representation Learning" (2017), for images of any size.

Encoder: strided 4x4 convolutions, a 3x3 convolution, residual blocks (ReLU, 3x3, ReLU, 1x1) and a 1x1 projection
to the code dimension. The decoder mirrors it with transposed 4x4 convolutions (section 4.1 of the paper).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.nn import VectorQuantizer


class VQVAELosses(NamedTuple):
    """The terms of equation 3 of the paper, each a scalar."""

    total: Tensor  # reconstruction + quantization
    reconstruction: Tensor  # mean squared error over all pixels and channels
    quantization: Tensor  # codebook loss + beta * commitment loss


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x))))."""

    def __init__(self, channels: int, residual_channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, residual_channels, 3, padding=1)
        self.pointwise = nn.Conv2d(residual_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pointwise(F.relu(self.spatial(F.relu(x))))


class VQVAE(nn.Module):
    """Vector-quantized autoencoder.

    Args:
        in_channels: channels of the images.
        hidden_channels: width of encoder and decoder.
        code_dim: D, the length of a code vector.
        codebook_size: K, the number of code vectors.
        downsamplings: number of strided convolutions; each halves height and width.
        residual_blocks: number of residual blocks in the encoder, and again in the decoder.
        residual_channels: width inside a residual block; `hidden_channels` (the paper) when None.
        beta: weight of the commitment loss.
        ema_decay: None trains the codebook by the paper's codebook loss; a float by moving averages (appendix A.1).
        backend: who computes the quantization, see `vqkernels.use_backend`.

    Images whose sides are no multiple of `2 ** downsamplings` are continued at the lower and right edge (by repeating
    the last row and column), and the reconstruction is cropped back: it always has the size of its image.

    Raises:
        ValueError: a size is not positive, or an input has the wrong shape.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        hidden_channels: int = 128,
        code_dim: int = 64,
        codebook_size: int = 512,
        downsamplings: int = 2,
        residual_blocks: int = 2,
        residual_channels: int | None = None,
        beta: float = 0.25,
        ema_decay: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        residual_channels = hidden_channels if residual_channels is None else residual_channels
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("hidden_channels", hidden_channels, 1),
            ("downsamplings", downsamplings, 1),
            ("residual_blocks", residual_blocks, 0),
            ("residual_channels", residual_channels, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, but is {value}")
        self.in_channels = in_channels
        self.downsampling_factor = 2**downsamplings

        encoder: list[nn.Module] = []
        channels = in_channels
        for _ in range(downsamplings):
            encoder += [nn.Conv2d(channels, hidden_channels, 4, stride=2, padding=1), nn.ReLU()]
            channels = hidden_channels
        encoder.append(nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1))
        encoder += [ResidualBlock(hidden_channels, residual_channels) for _ in range(residual_blocks)]
        encoder += [nn.ReLU(), nn.Conv2d(hidden_channels, code_dim, 1)]
        self.encoder = nn.Sequential(*encoder)

        self.quantizer = VectorQuantizer(
            code_dim, codebook_size, beta=beta, ema_decay=ema_decay, channel_dim=1, backend=backend
        )

        decoder: list[nn.Module] = [nn.Conv2d(code_dim, hidden_channels, 3, padding=1)]
        decoder += [ResidualBlock(hidden_channels, residual_channels) for _ in range(residual_blocks)]
        for _ in range(downsamplings - 1):
            decoder += [nn.ReLU(), nn.ConvTranspose2d(hidden_channels, hidden_channels, 4, stride=2, padding=1)]
        decoder += [nn.ReLU(), nn.ConvTranspose2d(hidden_channels, in_channels, 4, stride=2, padding=1)]
        self.decoder = nn.Sequential(*decoder)

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the codes of an image of this height and width."""
        factor = self.downsampling_factor
        return -(-size[0] // factor), -(-size[1] // factor)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, VQVAELosses]:
        """Reconstruct images x (B, C, H, W).

        Returns:
            reconstruction (B, C, H, W), indices (B, h, w) int64, and the three losses.
        """
        quantized, indices, quantization = self.quantizer(self._encode(x))
        reconstruction = self._crop(self.decoder(quantized), x.shape[-2], x.shape[-1])
        error = F.mse_loss(reconstruction, x, reduction="sum") / max(x.numel(), 1)  # 0 for an empty batch
        return reconstruction, indices, VQVAELosses(error + quantization, error, quantization)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, h, w) int64 of images x (B, C, H, W). Statistics of the quantizer are left alone."""
        training = self.quantizer.training
        self.quantizer.eval()
        _, indices, _ = self.quantizer(self._encode(x))
        self.quantizer.train(training)
        return indices

    def decode(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Images (B, C, H, W) of codes (B, h, w).

        Args:
            size: (H, W) of the images; `downsampling_factor` times (h, w) when None.

        Raises:
            ValueError: images of this size do not have (h, w) codes.
        """
        if indices.ndim != 3:
            raise ValueError(f"indices must be (B, h, w), but have shape {tuple(indices.shape)}")
        height, width = indices.shape[-2:]
        if size is not None and self.latent_size(size) != (height, width):
            raise ValueError(
                f"an image of {size[0]}x{size[1]} has {self.latent_size(size)[0]}x{self.latent_size(size)[1]} codes, "
                f"but indices are {height}x{width}"
            )
        codes = self.quantizer.decode(indices)  # an EMA codebook stays float32 in a model of another dtype
        image = self.decoder(codes.to(next(self.decoder.parameters()).dtype))
        return image if size is None else self._crop(image, *size)

    def _encode(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, H, W), but has shape {tuple(x.shape)}")
        below, right = -x.shape[-2] % self.downsampling_factor, -x.shape[-1] % self.downsampling_factor
        if below or right:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        return self.encoder(x)

    @staticmethod
    def _crop(image: Tensor, height: int, width: int) -> Tensor:
        return image[..., :height, :width]
