"""A decoder strong enough to do without latents: a PixelCNN over the pixels, conditioned on them in space.

p(x | z) = prod_i p(x_i | x before i, features of z), as in van den Oord et al., "Conditional Image Generation with
PixelCNN Decoders" (2016), and Gulrajani et al., "PixelVAE" (2016). It is a `Likelihood`, so `VQVAE` and `VAE` take it
like any other, with the encoder and the convolutional decoder they have; what that decoder gives is the condition. With
it a VAE's latents tend to go unused (posterior collapse); the comparison shows that.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.models.likelihoods import VALUES, Likelihood
from vqkernels.models.pixelcnn import PixelCNN


class AutoregressiveDecoder(nn.Module, Likelihood):
    """p(x | features) of images x (B, C, H, W) in [-1, 1], rounded to `levels` intensities, as a PixelCNN.

    The channels of a pixel follow one another: the PixelCNN sees a grid of H x (W C) values. `log_prob` is that of the
    rounded image, so bits per dimension compare only between models of equally many levels.

    Args:
        channels: C.
        levels: intensities, evenly spaced from -1 to 1; 256 keeps 8-bit images as they are.
        features: P, the channels that the decoder of the latents gives for every pixel.
        hidden_channels, num_layers, head_channels: of the PixelCNN.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        channels: int,
        *,
        levels: int = 16,
        features: int = 32,
        hidden_channels: int = 32,
        num_layers: int = 5,
        head_channels: int = 64,
    ) -> None:
        nn.Module.__init__(self)
        Likelihood.__init__(self, channels)
        if not 2 <= levels <= VALUES:
            raise ValueError(f"levels must be between 2 and {VALUES}, but is {levels}")
        if features < 1:
            raise ValueError(f"features must be at least 1, but is {features}")
        self.levels, self.features = levels, features
        self.pixelcnn = PixelCNN(
            levels,
            hidden_channels=hidden_channels,
            num_layers=num_layers,
            condition_channels=features + (channels if channels > 1 else 0),
            head_channels=head_channels,
        )

    @property
    def parameters_per_pixel(self) -> int:
        return self.features

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """log p of the rounded image, (B,) in nats."""
        logits, levels = self._logits(parameters, x)
        return -F.cross_entropy(logits, levels, reduction="none").sum((1, 2))

    def score(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p of the rounded image, (B,), and the expected value of every pixel given those of x before it."""
        logits, levels = self._logits(parameters, x)
        log_prob = -F.cross_entropy(logits, levels, reduction="none").sum((1, 2))
        values = torch.linspace(-1, 1, self.levels, dtype=logits.dtype, device=logits.device)
        expected = torch.einsum("blhw,l->bhw", F.softmax(logits.detach(), dim=1), values)
        return log_prob, self._image(expected)

    def mean(self, parameters: Tensor) -> Tensor:
        """An image (B, C, H, W): the expectation over all of them has no closed form, so one draw of a fixed seed."""
        return self.sample(parameters, torch.Generator(parameters.device).manual_seed(0))

    @torch.no_grad()
    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """An image (B, C, H, W) whose values are among the levels, drawn pixel by pixel."""
        condition = self._condition(parameters)
        batch, _, height, width = condition.shape
        drawn = self.pixelcnn.sample((batch, height, width), condition=condition, generator=generator)
        return self._image(drawn.to(parameters.dtype) * (2 / (self.levels - 1)) - 1)

    def to_levels(self, x: Tensor) -> Tensor:
        """The nearest level of every value of x (B, C, H, W): (B, H, W C) int64, in the PixelCNN's order."""
        levels = ((x.clamp(-1, 1) + 1) * ((self.levels - 1) / 2)).round().long()
        return levels.permute(0, 2, 3, 1).flatten(2)

    def _logits(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.to_levels(x)
        return self.pixelcnn(levels, condition=self._condition(parameters)), levels

    def _condition(self, parameters: Tensor) -> Tensor:
        """Features of the pixel, and which of its channels it is, for every value: (B, P', H, W C)."""
        if parameters.ndim != 4 or parameters.shape[1] != self.features:
            raise ValueError(f"parameters must be (B, {self.features}, H, W), but have shape {tuple(parameters.shape)}")
        if self.channels == 1:
            return parameters
        batch, _, height, width = parameters.shape
        which = torch.eye(self.channels, dtype=parameters.dtype, device=parameters.device).repeat(1, width)
        which = which[None, :, None].expand(batch, -1, height, -1)
        return torch.cat([parameters.repeat_interleave(self.channels, dim=3), which], dim=1)

    def _image(self, values: Tensor) -> Tensor:
        """(B, H, W C) as an image (B, C, H, W)."""
        return values.unflatten(2, (-1, self.channels)).movedim(3, 1)
