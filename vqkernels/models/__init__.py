"""Full models built on the layers of `vqkernels.nn`: the VQ-VAE and its autoregressive prior."""

from vqkernels.models.pixelcnn import PixelCNN
from vqkernels.models.pixelcnn_loading import from_gated_pixelcnn
from vqkernels.models.vqvae import VQVAE, VQVAELosses

__all__ = ["VQVAE", "PixelCNN", "VQVAELosses", "from_gated_pixelcnn"]
