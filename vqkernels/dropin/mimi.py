"""Drop-in quantizers for Mimi (Défossez et al. 2024, "Moshi") in `transformers`, and the names of Kyutai's checkpoints.

Codes are the present sums over the present usages, in every call. The search is exact and builds no N x K distances, so
a batch gets the codes of its rows alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adoption import adopt_as, share
from .tokens import TokenCodebook, TokenLayer, adopt_layer, release_layer


class MimiEuclideanCodebook(TokenCodebook):
    """`transformers.models.mimi.modeling_mimi.MimiEuclideanCodebook`.

    State, buffers that follow a cast of the model, as in the peer: `initialized (1,)`, `cluster_usage (K,)`,
    `embed_sum (K, D)`.
    """

    initialized: Tensor
    cluster_usage: Tensor
    embed_sum: Tensor
    epsilon: float

    def __init__(self, config: Any, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.codebook_size, self.epsilon = config.codebook_size, epsilon
        self.register_buffer("initialized", torch.ones(1))
        self.register_buffer("cluster_usage", torch.ones(config.codebook_size))
        self.register_buffer("embed_sum", torch.zeros(config.codebook_size, config.codebook_dim))

    @property
    def embed(self) -> Tensor:  # type: ignore[override]
        """The codes, (K, D): `embed_sum / max(cluster_usage, epsilon)`."""
        # Not cached: a tensor does not show that its data changed (after `x.data.copy_`), and a comparison costs more
        # than the quotient, which takes a third of the search's time for one row and less for more.
        return self.embed_sum / self.cluster_usage.clamp(min=self.epsilon)[:, None]

    def decode(self, embed_ind: Tensor) -> Tensor:
        """int64 (...) -> codes (..., D)."""
        usage = self.cluster_usage.clamp(min=self.epsilon)[:, None]
        return F.embedding(embed_ind, self.embed_sum) / F.embedding(embed_ind, usage)


class MimiVectorQuantization(TokenLayer):
    """`transformers.models.mimi.modeling_mimi.MimiVectorQuantization`. State: `codebook.*`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.codebook = MimiEuclideanCodebook(config)


_PARTS = {
    "rvq_first.vq.": "semantic_residual_vector_quantizer.",
    "rvq_rest.vq.": "acoustic_residual_vector_quantizer.",
    "rvq_first.": "semantic_residual_vector_quantizer.",
    "rvq_rest.": "acoustic_residual_vector_quantizer.",
    "._codebook.": ".codebook.",
}
_BUFFERS = {
    "_initialized": "initialized",
    "embedding_sum": "embed_sum",
    # names of Kyutai's older checkpoints
    "inited": "initialized",
    "cluster_size": "cluster_usage",
    "embed_avg": "embed_sum",
}


def from_moshi(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A quantizer's state dict of Kyutai's `moshi` with the names of `transformers`; the tensors are the same.

    Args:
        state: keys like `rvq_first.vq.layers.0._codebook.embedding_sum`, with any prefix.
    """
    return {_renamed(key): value for key, value in state.items()}


def _renamed(key: str) -> str:
    for old, new in _PARTS.items():
        key = key.replace(old, new)
    head, dot, name = key.rpartition(".")
    return f"{head}{dot}{_BUFFERS.get(name, name)}" if head.endswith(".codebook") else key


def _adopt_codebook(peer: nn.Module) -> MimiEuclideanCodebook:
    return adopt_as(MimiEuclideanCodebook, peer)


def _release_codebook(ours: nn.Module, peer: nn.Module) -> None:
    share(ours, peer)
    peer.__dict__["_embed"] = None  # the peer keeps the codes that it computed first


_TRANSFORMERS = "transformers.models.mimi.modeling_mimi"
ADAPTERS = {
    f"{_TRANSFORMERS}.MimiVectorQuantization": adopt_layer(MimiVectorQuantization, _adopt_codebook),
    f"{_TRANSFORMERS}.MimiEuclideanCodebook": _adopt_codebook,
}
RELEASERS = {
    f"{_TRANSFORMERS}.MimiVectorQuantization": release_layer(_release_codebook),
    f"{_TRANSFORMERS}.MimiEuclideanCodebook": _release_codebook,
}
