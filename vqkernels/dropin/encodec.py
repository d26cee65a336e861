"""Drop-in quantizers for EnCodec (Défossez et al. 2022): Meta's `encodec`, and `transformers`, which does not train.

Search, look-up, commitment loss and the statistics of the moving averages are one pass over (B, D, T) without a
permuted copy. No distances and no one-hot matrix are built. The k-means of the first batch builds neither N x K nor
N x K x D.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.synchronisation import world_size
from ..nn.wide import wide_dtype
from ..ops.kmeans import kmeans
from ..ops.nearest import nearest_code
from ..ops.quantize import Quantization, quantize_with_statistics
from ..ops.recomputation import enter
from ..ops.statistics import codebook_statistics
from .adoption import adopt_as, check_unhooked, share, share_hooks
from .from_data import FromData, has_rows
from .laplace import laplace_step_
from .tokens import TokenCodebook, TokenLayer, adopt_layer, release_layer


class EuclideanCodebook(FromData):
    """`encodec.quantization.core_vq.EuclideanCodebook`: codes trained by moving averages.

    Args:
        dim: D.
        codebook_size: K.
        kmeans_init: k-means on the first rows gives the codes; otherwise they are uniform (Kaiming).
        kmeans_iters: at most so many iterations of k-means.
        decay, epsilon: of the averages, see `vqkernels.dropin.laplace`.
        threshold_ema_dead_code: without effect, as in the peer, where the same step overwrites what replaces a dead
            code.

    State, float32 buffers, also after a cast of the module: `inited (1,)`, `cluster_size (K,)`, `embed (K, D)`,
    `embed_avg (K, D)`. A batch without a usable row does not initialise. With a process group the statistics of all
    ranks are summed, and rank 0 initialises. Set `synchronise = False` on the codebook to use no group, for example if
    only some ranks have the layer.
    """

    synchronise = True
    _flag = "inited"

    inited: Tensor
    cluster_size: Tensor
    embed: Tensor
    embed_avg: Tensor
    codebook_size: int
    kmeans_iters: int
    decay: float
    epsilon: float

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        threshold_ema_dead_code: int = 2,
    ) -> None:
        super().__init__()
        self.codebook_size, self.kmeans_iters, self.decay = codebook_size, kmeans_iters, decay
        self.epsilon, self.threshold_ema_dead_code = epsilon, threshold_ema_dead_code
        embed = torch.zeros(codebook_size, dim, dtype=wide_dtype())
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
        self.register_buffer("inited", embed.new_full((1,), float(not kmeans_init)))
        self.register_buffer("cluster_size", embed.new_zeros(codebook_size))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())
        self._seen = None if kmeans_init else self.inited

    def encode(self, x: Tensor) -> Tensor:
        """Rows (..., D) -> int64 (...)."""
        return nearest_code(x, self.embed)

    def decode(self, embed_ind: Tensor) -> Tensor:
        """int64 (...) -> codes (..., D)."""
        return F.embedding(embed_ind, self.embed)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (..., D) -> codes (..., D) without a gradient, int64 (...); learns in training."""
        result = self.learn(x, -1)
        return result.quantized.detach(), result.indices

    def learn(self, x: Tensor, channel_dim: int) -> Quantization:
        """One pass over x. In training the averages and codes are updated after the codes were looked up."""
        self._initialise(x, channel_dim)
        if not self.training:
            return quantize_with_statistics(x, self.embed, channel_dim=channel_dim, statistics=False)
        self.widen_buffers()
        # The backward pass needs the codes that were looked up, and the update below overwrites them.
        seen = enter(self.inited, x, [self.embed], changes=torch.is_grad_enabled())
        learns = seen.first is not False
        result = quantize_with_statistics(x, seen.state[0], channel_dim=channel_dim, statistics=learns)
        averages = self.embed, self.cluster_size, self.embed_avg
        laplace_step_(averages, result, seen, decay=self.decay, eps=self.epsilon, synchronise=self.synchronise)
        return result

    @torch.no_grad()
    def _initialise(self, x: Tensor, channel_dim: int) -> None:
        if self._is_initialised():
            return
        joined = self.synchronise and world_size() > 1
        if x.numel() == 0 and not joined:
            return  # the next batch may have rows
        codes, distinct = kmeans(x, self.codebook_size, iterations=self.kmeans_iters, channel_dim=channel_dim)
        if joined:
            dist.broadcast(distinct, 0)
        if not has_rows(distinct, self.codebook_size):
            return
        indices = nearest_code(x, codes, channel_dim=channel_dim)
        counts, _ = codebook_statistics(x, indices, self.codebook_size, channel_dim=channel_dim)
        self.embed.copy_(codes)
        self.embed_avg.copy_(codes)
        self.cluster_size.copy_(counts)
        self.inited.fill_(1)
        if joined:
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)
        self._seen = self.inited


class VectorQuantization(nn.Module):
    """`encodec.quantization.core_vq.VectorQuantization`.

    Args:
        dim: channels of x.
        codebook_size: K.
        codebook_dim: channels of the codes. If it is not `dim`, linear maps project to it and back.
        decay, epsilon, kmeans_init, kmeans_iters, threshold_ema_dead_code: as in `EuclideanCodebook`.
        commitment_weight: of the loss.

    State: `_codebook.*`, and with projections `project_in`, `project_out`.
    """

    commitment_weight: float
    _codebook: EuclideanCodebook

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        kmeans_init: bool = True,
        kmeans_iters: int = 50,
        threshold_ema_dead_code: int = 2,
        commitment_weight: float = 1.0,
    ) -> None:
        super().__init__()
        inner = dim if codebook_dim is None else codebook_dim
        self.project_in: nn.Module = nn.Linear(dim, inner) if inner != dim else nn.Identity()
        self.project_out: nn.Module = nn.Linear(inner, dim) if inner != dim else nn.Identity()
        self.epsilon, self.commitment_weight, self.codebook_size = epsilon, commitment_weight, codebook_size
        options = (kmeans_init, kmeans_iters, decay, epsilon, threshold_ema_dead_code)
        self._codebook = EuclideanCodebook(inner, codebook_size, *options)

    @property
    def codebook(self) -> Tensor:
        """The codes, (K, codebook_dim)."""
        return self._codebook.embed

    def encode(self, x: Tensor) -> Tensor:
        """x (B, dim, T) -> int64 (B, T)."""
        return self._codebook.encode(self.project_in(x.transpose(1, 2)))

    def decode(self, embed_ind: Tensor) -> Tensor:
        """int64 (B, T) -> (B, dim, T)."""
        return self.project_out(self._codebook.decode(embed_ind)).transpose(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, dim, T) -> `(quantized (B, dim, T), indices (B, T), loss (1,))`.

        In eval the loss is 0 and quantized has no gradient to x, as in the peer.
        """
        result = self._codebook.learn(self.project_in(x.transpose(1, 2)), -1)
        quantized = result.quantized if self.training else result.quantized.detach()
        leaf = self.training and not torch.compiler.is_compiling()  # a compiled graph cannot make a leaf
        loss = torch.zeros(1, device=x.device, requires_grad=leaf)
        if self.training and self.commitment_weight > 0:
            loss = loss + result.commitment_loss * self.commitment_weight
        return self.project_out(quantized).transpose(1, 2), result.indices, loss


class ResidualVectorQuantization(nn.Module):
    """`encodec.quantization.core_vq.ResidualVectorQuantization`: each layer quantizes the residual of the ones before.

    The gradient passes every layer straight through, as in the peer. So only the commitment loss of the first layer
    has a gradient to x (facebookresearch/encodec, issue 25).

    Args:
        num_quantizers: Q.
        **kwargs: arguments of every `VectorQuantization`.

    State: `layers.{i}.*`.
    """

    def __init__(self, *, num_quantizers: int, **kwargs: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VectorQuantization(**kwargs) for _ in range(num_quantizers))

    def forward(self, x: Tensor, n_q: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, dim, T) -> `(quantized (B, dim, T), indices (Q, B, T), losses (Q, 1))`, of the first n_q layers."""
        residual, total, indices, losses = x, torch.zeros_like(x), [], []
        for layer in self.layers[: n_q or len(self.layers)]:
            quantized, found, loss = layer(residual)
            residual, total = residual - quantized, total + quantized
            indices.append(found)
            losses.append(loss)
        return total, torch.stack(indices), torch.stack(losses)

    def encode(self, x: Tensor, n_q: int | None = None) -> Tensor:
        """x (B, dim, T) -> int64 (Q, B, T)."""
        indices = []
        for layer in self.layers[: n_q or len(self.layers)]:
            assert isinstance(layer, VectorQuantization)
            indices.append(layer.encode(x))
            x = x - layer.decode(indices[-1])
        return torch.stack(indices)

    def decode(self, q_indices: Tensor) -> Tensor:
        """int64 (Q, B, T) -> (B, dim, T)."""
        total = torch.zeros((), device=q_indices.device)
        for layer, indices in zip(self.layers, q_indices, strict=False):
            assert isinstance(layer, VectorQuantization)
            total = total + layer.decode(indices)
        return total


class EncodecEuclideanCodebook(TokenCodebook):
    """`transformers.models.encodec.modeling_encodec.EncodecEuclideanCodebook`.

    State, buffers that follow a cast of the model, as in the peer: `inited (1,)`, `cluster_size (K,)`,
    `embed (K, D)`, `embed_avg (K, D)`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.codebook_size = config.codebook_size
        self.register_buffer("inited", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(config.codebook_size))
        self.register_buffer("embed", torch.zeros(config.codebook_size, config.codebook_dim))
        self.register_buffer("embed_avg", torch.zeros(config.codebook_size, config.codebook_dim))


class EncodecVectorQuantization(TokenLayer):
    """`transformers.models.encodec.modeling_encodec.EncodecVectorQuantization`. State: `codebook.*`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.codebook = EncodecEuclideanCodebook(config)


def _adopt(peer: nn.Module) -> VectorQuantization:
    check_unhooked(peer, "_codebook")
    ours = adopt_as(VectorQuantization, peer, apart=frozenset({"_codebook"}))
    inner = peer.get_submodule("_codebook")
    ours._codebook = adopt_as(EuclideanCodebook, inner)
    ours._codebook._look()
    share_hooks(inner, ours._codebook)
    return ours


def _release(ours: nn.Module, peer: nn.Module) -> None:
    share(ours, peer, apart=frozenset({"_codebook"}))
    share(ours.get_submodule("_codebook"), peer.get_submodule("_codebook"))


def _adopt_codebook(peer: nn.Module) -> EncodecEuclideanCodebook:
    return adopt_as(EncodecEuclideanCodebook, peer)


_TRANSFORMERS = "transformers.models.encodec.modeling_encodec"
ADAPTERS = {
    "encodec.quantization.core_vq.VectorQuantization": _adopt,
    f"{_TRANSFORMERS}.EncodecVectorQuantization": adopt_layer(EncodecVectorQuantization, _adopt_codebook),
    f"{_TRANSFORMERS}.EncodecEuclideanCodebook": _adopt_codebook,
}
RELEASERS = {
    "encodec.quantization.core_vq.VectorQuantization": _release,
    f"{_TRANSFORMERS}.EncodecVectorQuantization": release_layer(share),
    f"{_TRANSFORMERS}.EncodecEuclideanCodebook": share,
}
