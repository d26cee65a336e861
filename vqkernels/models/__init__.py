"""Full models built on the layers of `vqkernels.nn`: the VQ-VAE and its autoregressive priors."""

from vqkernels.models.pixelcnn import PixelCNN
from vqkernels.models.pixelcnn_loading import from_gated_pixelcnn
from vqkernels.models.transformer import TransformerPrior
from vqkernels.models.vqvae import VQVAE, VQVAELosses

__all__ = ["VQVAE", "PixelCNN", "Prior", "TransformerPrior", "VQVAELosses", "from_gated_pixelcnn"]

Prior = PixelCNN | TransformerPrior  # what is trained on codes and sampled
