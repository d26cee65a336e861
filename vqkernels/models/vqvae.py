"""The VQ-VAE of van den Oord et al., "Neural Discrete Representation Learning" (2017), for images of any size."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels.models.autoencoder import Autoencoder
from vqkernels.models.likelihoods import Likelihood, Name, bits_per_dimension, make_likelihood
from vqkernels.models.pixelcnn import PixelCNN
from vqkernels.models.transformer import TransformerPrior
from vqkernels.nn import VectorQuantizer


class VQVAELosses(NamedTuple):
    """The terms of equation 3 of the paper, each a scalar."""

    total: Tensor  # reconstruction + quantization
    reconstruction: Tensor  # over all pixels and channels, the mean squared error, or the mean of -log p(x | codes)
    quantization: Tensor  # codebook loss + beta * commitment loss


class VQVAE(Autoencoder):
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
        init, revive: how the codes start, and what happens to unused ones; see `VectorQuantizer`.
        likelihood: None: the decoder gives the image, trained by its squared error. A name: it gives the parameters of
            a distribution over 8-bit images (`vqkernels.models.likelihoods`), trained by -log p(x | codes), and
            `bits_per_dim` can be asked for. A `Likelihood`, such as an `AutoregressiveDecoder`, is used as it is.
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
        init: str = "uniform",
        revive: str = "off",
        likelihood: Name | Likelihood | None = None,
        backend: str = "auto",
    ) -> None:
        distribution = None if likelihood is None else make_likelihood(likelihood, in_channels)
        super().__init__(
            in_channels,
            code_dim,
            hidden_channels=hidden_channels,
            downsamplings=downsamplings,
            residual_blocks=residual_blocks,
            residual_channels=residual_channels,
        )
        self.likelihood: Likelihood | None = distribution
        self.quantizer = VectorQuantizer(
            code_dim,
            codebook_size,
            beta=beta,
            ema_decay=ema_decay,
            init=init,
            revive=revive,
            channel_dim=1,
            backend=backend,
        )
        self.decoder = self._make_decoder(
            code_dim, in_channels if distribution is None else distribution.parameters_per_pixel
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, VQVAELosses]:
        """Reconstruct images x (B, C, H, W).

        Returns:
            reconstruction (B, C, H, W), the mean of the likelihood if there is one; indices (B, h, w) int64, and the
            three losses.
        """
        quantized, indices, quantization = self.quantizer(self._encode(x))
        decoded = self._crop(self.decoder(quantized), x.shape[-2], x.shape[-1])
        decoded = decoded.to(x.dtype)  # under autocast the image and its likelihood are as exact as the input
        if self.likelihood is None:
            reconstruction, error = decoded, F.mse_loss(decoded, x, reduction="sum")
        else:
            log_prob, reconstruction = self.likelihood.score(decoded, x)
            error = -log_prob.sum()
        error = error / max(x.numel(), 1)  # 0 for an empty batch
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
        """Images (B, C, H, W) of codes (B, h, w); the mean of the likelihood if there is one.

        Args:
            size: (H, W) of the images; `downsampling_factor` times (h, w) when None.

        Raises:
            ValueError: images of this size do not have (h, w) codes.
        """
        decoded = self._decoded(indices, size)
        return decoded if self.likelihood is None else self.likelihood.mean(decoded)

    @torch.no_grad()
    def bits_per_dim(
        self, x: Tensor, prior: PixelCNN | TransformerPrior | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """An upper bound of -log2 p(x), per pixel and channel: (B,) of 8-bit images x (B, C, H, W) in [-1, 1].

        -log p(x) <= -log p(x | codes) - log p(codes): the encoder puts all its mass on one grid of codes, so its
        entropy is 0 (section 3.1 of the paper).

        Args:
            prior: of the codes; None for the uniform one, log2 K bits a code.
            labels: (B,), for a class-conditional prior.

        Raises:
            ValueError: the model has no likelihood.
        """
        if self.likelihood is None:
            raise ValueError("bits_per_dim needs a likelihood: build the VQVAE with likelihood='logistic_mixture'")
        indices = self.encode(x)
        nats = -self.likelihood.log_prob(self._decoded(indices, (x.shape[-2], x.shape[-1])), x)
        bits_per_code = (
            math.log2(self.quantizer.codebook_size) if prior is None else prior.bits_per_code(indices, labels)
        )
        dimensions = x[0].numel()
        return bits_per_dimension(nats, dimensions) + bits_per_code * indices[0].numel() / dimensions

    def log_prob(self, x: Tensor, indices: Tensor) -> Tensor:
        """log p(x | codes), (B,) in nats, of images x (B, C, H, W) and any codes (B, h, w).

        Raises:
            ValueError: the model has no likelihood, or images of this size do not have (h, w) codes.
        """
        if self.likelihood is None:
            raise ValueError("log_prob needs a likelihood: build the VQVAE with likelihood='logistic_mixture'")
        return self.likelihood.log_prob(self._decoded(indices, (x.shape[-2], x.shape[-1])), x)

    def _decoded(self, indices: Tensor, size: tuple[int, int] | None) -> Tensor:
        """What the decoder gives for codes (B, h, w), cropped to an image of this size."""
        if indices.ndim != 3:
            raise ValueError(f"indices must be (B, h, w), but have shape {tuple(indices.shape)}")
        if size is not None:
            self._check_size((indices.shape[-2], indices.shape[-1]), size)
        codes = self.quantizer.decode(indices)  # an EMA codebook stays float32 in a model of another dtype
        decoded = self.decoder(codes.to(next(self.decoder.parameters()).dtype))
        return decoded if size is None else self._crop(decoded, *size)
