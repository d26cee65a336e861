"""Full models on the layers of `vqkernels.nn`: the VQ-VAE and its autoregressive priors, and the VAE beside it."""

from vqkernels.models.autoregressive_decoder import AutoregressiveDecoder
from vqkernels.models.pixelcnn import PixelCNN
from vqkernels.models.pixelcnn_loading import from_gated_pixelcnn
from vqkernels.models.transformer import TransformerPrior
from vqkernels.models.vae import VAE, VAELosses
from vqkernels.models.vqvae import VQVAE, VQVAELosses

__all__ = [
    "VAE",
    "VQVAE",
    "AutoregressiveDecoder",
    "PixelCNN",
    "Prior",
    "TransformerPrior",
    "VAELosses",
    "VQVAELosses",
    "from_gated_pixelcnn",
]

Prior = PixelCNN | TransformerPrior  # what is trained on codes and sampled
