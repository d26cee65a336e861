"""Codebooks that only encode and decode, like those of Encodec and Mimi in `transformers`.

The search reads (B, D, T) without a permuted copy and builds no N x K matrix of distances. Ties go to the lowest index.
A row gets the same code in a batch and alone.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.nearest import nearest_code
from .adoption import adopt_as, share, share_hooks

_CODEBOOK = frozenset({"codebook"})


class TokenCodebook(nn.Module):
    """A codebook whose codes are `embed (K, D)`, which a subclass defines."""

    embed: Tensor

    def quantize(self, hidden_states: Tensor) -> Tensor:
        """Rows (N, D) -> int64 (N,)."""
        return nearest_code(hidden_states, self.embed)

    def encode(self, hidden_states: Tensor) -> Tensor:
        """Rows (..., D) -> int64 (...)."""
        return nearest_code(hidden_states, self.embed)

    def decode(self, embed_ind: Tensor) -> Tensor:
        """int64 (...) -> codes (..., D)."""
        return F.embedding(embed_ind, self.embed)


class TokenLayer(nn.Module):
    """A codebook for channels-first rows."""

    codebook: TokenCodebook

    def encode(self, hidden_states: Tensor) -> Tensor:
        """Rows (B, D, T) -> int64 (B, T)."""
        return nearest_code(hidden_states, self.codebook.embed, channel_dim=1)

    def decode(self, embed_ind: Tensor) -> Tensor:
        """int64 (B, T) -> codes (B, D, T)."""
        return self.codebook.decode(embed_ind).permute(0, 2, 1)


def adopt_layer(
    layer: type[TokenLayer], adopt_codebook: Callable[[nn.Module], TokenCodebook]
) -> Callable[[nn.Module], TokenLayer]:
    """A function that takes over a peer's layer and the codebook inside."""

    def adopt(peer: nn.Module) -> TokenLayer:
        ours = adopt_as(layer, peer, apart=_CODEBOOK)
        inner = peer.get_submodule("codebook")
        ours.codebook = adopt_codebook(inner)
        share_hooks(inner, ours.codebook)
        return ours

    return adopt


def release_layer(
    release_codebook: Callable[[nn.Module, nn.Module], None],
) -> Callable[[nn.Module, nn.Module], None]:
    """A function that gives back what `adopt_layer` took over."""

    def release(ours: nn.Module, peer: nn.Module) -> None:
        share(ours, peer, apart=_CODEBOOK)
        release_codebook(ours.get_submodule("codebook"), peer.get_submodule("codebook"))

    return release
