"""Encoder and decoder of van den Oord et al., "Neural Discrete Representation Learning" (2017), section 4.1.

Encoder: strided 4x4 convolutions, a 3x3 convolution, residual blocks (ReLU, 3x3, ReLU, 1x1) and a 1x1 projection. The
decoder mirrors it with transposed 4x4 convolutions. `VQVAE` and `VAE` share them, so that only the latents differ.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x))))."""

    def __init__(self, channels: int, residual_channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, residual_channels, 3, padding=1)
        self.pointwise = nn.Conv2d(residual_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pointwise(F.relu(self.spatial(F.relu(x))))


class Autoencoder(nn.Module):
    """An encoder and a decoder around latents whose sides are those of the image over `downsampling_factor`.

    Images whose sides are no multiple of it are continued at the lower and right edge (by repeating the last row and
    column), and what is decoded is cropped back.

    Args:
        in_channels: channels of the images.
        encoded_channels: channels that the encoder gives.
        hidden_channels: width of encoder and decoder.
        downsamplings: number of strided convolutions; each halves height and width.
        residual_blocks: number of residual blocks in the encoder, and again in the decoder.
        residual_channels: width inside a residual block; `hidden_channels` (the paper) when None.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        encoded_channels: int,
        *,
        hidden_channels: int,
        downsamplings: int,
        residual_blocks: int,
        residual_channels: int | None,
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
        self._sizes = (hidden_channels, residual_channels, downsamplings, residual_blocks)

        encoder: list[nn.Module] = []
        channels = in_channels
        for _ in range(downsamplings):
            encoder += [nn.Conv2d(channels, hidden_channels, 4, stride=2, padding=1), nn.ReLU()]
            channels = hidden_channels
        encoder.append(nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1))
        encoder += [ResidualBlock(hidden_channels, residual_channels) for _ in range(residual_blocks)]
        encoder += [nn.ReLU(), nn.Conv2d(hidden_channels, encoded_channels, 1)]
        self.encoder = nn.Sequential(*encoder)

    def _make_decoder(self, latent_channels: int, decoded_channels: int) -> nn.Sequential:
        """The encoder's mirror image; a model makes it last, after what lies between."""
        hidden_channels, residual_channels, downsamplings, residual_blocks = self._sizes
        decoder: list[nn.Module] = [nn.Conv2d(latent_channels, hidden_channels, 3, padding=1)]
        decoder += [ResidualBlock(hidden_channels, residual_channels) for _ in range(residual_blocks)]
        for _ in range(downsamplings - 1):
            decoder += [nn.ReLU(), nn.ConvTranspose2d(hidden_channels, hidden_channels, 4, stride=2, padding=1)]
        decoder += [nn.ReLU(), nn.ConvTranspose2d(hidden_channels, decoded_channels, 4, stride=2, padding=1)]
        return nn.Sequential(*decoder)

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the latents of an image of this height and width."""
        factor = self.downsampling_factor
        return -(-size[0] // factor), -(-size[1] // factor)

    def _encode(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, H, W), but has shape {tuple(x.shape)}")
        below, right = -x.shape[-2] % self.downsampling_factor, -x.shape[-1] % self.downsampling_factor
        if below or right:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        return self.encoder(x)

    def _check_size(self, latents: tuple[int, int], size: tuple[int, int]) -> None:
        if self.latent_size(size) != latents:
            raise ValueError(
                f"an image of {size[0]}x{size[1]} has {self.latent_size(size)[0]}x{self.latent_size(size)[1]} codes, "
                f"but indices are {latents[0]}x{latents[1]}"
            )

    @staticmethod
    def _crop(image: Tensor, height: int, width: int) -> Tensor:
        return image[..., :height, :width]
