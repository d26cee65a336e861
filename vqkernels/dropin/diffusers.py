"""Drop-in quantizer for diffusers: the `VectorQuantizer` inside `VQModel`."""

from torch import Tensor, nn

from .adoption import adopt_as, check_unhooked, share
from .vqgan import RemappedQuantizer


class VectorQuantizer(RemappedQuantizer):
    """`diffusers.models.autoencoders.vae.VectorQuantizer`.

    Args:
        n_e: K.
        vq_embed_dim: C, channels of z and of the codes.
        beta, remap, unknown_index, sane_index_shape, legacy: as in `vqkernels.dropin.taming.VectorQuantizer2`.

    State: see `vqkernels.dropin.vqgan.RemappedQuantizer`.
    """

    vq_embed_dim: int

    def __init__(
        self,
        n_e: int,
        vq_embed_dim: int,
        beta: float,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, vq_embed_dim, beta, remap, unknown_index, sane_index_shape, legacy)
        self.vq_embed_dim = vq_embed_dim

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """As `RemappedQuantizer.quantize`."""
        return self.quantize(z)


def _adopt(peer: nn.Module) -> VectorQuantizer:
    check_unhooked(peer, "embedding")
    return adopt_as(VectorQuantizer, peer)


ADAPTERS = {"diffusers.models.autoencoders.vae.VectorQuantizer": _adopt}
RELEASERS = dict.fromkeys(ADAPTERS, share)
