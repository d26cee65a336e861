"""Finds the quantizers of a user's model, and makes a counterpart of each for a comparison.

It recognises the layer of this package, lucidrains `VectorQuantize`, diffusers `VectorQuantizer`, and any module with
this protocol: a tensor `codebook` of shape (K, D), an int `channel_dim` that names z's channel axis, and `forward(z)`
that returns (quantized, indices, loss); optionally a float `beta`. The counterpart of a peer's layer is our layer. The
counterpart of our layer is the usual one-hot layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vqkernels.nn import VectorQuantizer

from .layers import OneHotQuantizer


class UnknownQuantizer(ValueError):
    """A quantizer that is recognised but whose options have no counterpart here."""


@dataclass(frozen=True)
class Found:
    """A quantizer at `path` of a model, with codes `codebook` (K, D)."""

    path: str
    kind: str
    codebook: Tensor
    ours: bool
    counterpart: Callable[[], nn.Module]  # makes what is timed against it, with the same call and return


class _Adapter(nn.Module):
    """Our layer with a peer's call and return; `before` and `after` are the peer's projections."""

    def __init__(self, layer: VectorQuantizer, before: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def quantize(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = self.layer(self.before(z), mask=mask)
        return self.after(quantized), indices, loss


class _ForDiffusers(_Adapter):
    """`(quantized (B, D, H, W), loss (), (None, None, indices))`, indices (N,), or (B, H, W) if `shaped`."""

    def __init__(self, layer: VectorQuantizer, shaped: bool, scale: float) -> None:
        super().__init__(layer)
        self.shaped, self.scale = shaped, scale

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        quantized, indices, loss = self.quantize(z)
        return quantized, self.scale * loss, (None, None, indices if self.shaped else indices.flatten())


class _ForLucidrains(_Adapter):
    """`(quantized, indices, loss)`. Options of a call that our layer does not have are refused, not ignored."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = sorted(name for name, value in options.items() if value is not None and value is not False)
        if given:
            raise UnknownQuantizer(
                f"the model calls its quantizer with {', '.join(given)}, which has no counterpart here"
            )
        return self.quantize(x, mask)


def _is_a(module: nn.Module, package: str, name: str) -> bool:
    """Whether its class or a base of it is `name` of `package`, without an import."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == package for c in type(module).__mro__)


def _layer_with(codebook: Tensor, **options: Any) -> VectorQuantizer:
    layer = VectorQuantizer(codebook.shape[1], codebook.shape[0], **options).to(codebook.device)
    layer.codebook.data.copy_(codebook.detach())
    if layer.ema_decay is not None:  # as if each code had been chosen once in every step so far
        layer.ema_counts.fill_(1)
        layer.ema_sums.copy_(layer.codebook)
    return layer


def _diffusers(path: str, module: Any) -> Found:
    if module.remap is not None:
        raise UnknownQuantizer(f"the diffusers VectorQuantizer at '{path}' remaps its indices; that has no counterpart")
    codes = module.embedding.weight
    # With legacy=True the weight is on the other loss: w codebook + commitment = w (codebook + commitment / w).
    weighted = module.legacy and module.beta > 0
    beta, scale = (1 / module.beta, module.beta) if weighted else (module.beta, 1.0)
    return Found(
        path,
        "diffusers VectorQuantizer",
        codes,
        False,
        lambda: _ForDiffusers(_layer_with(codes, channel_dim=1, beta=beta), module.sane_index_shape, scale),
    )


def _lucidrains(path: str, module: Any) -> Found:
    odd = {
        "heads": module.heads != 1,
        "use_cosine_sim": module.use_cosine_sim,
        "accept_3d_fmap": module.accept_3d_fmap,
        "a projection of images or of channels first": module.has_projections
        and (module.accept_image_fmap or not module.channel_last),
    }
    for name, used in odd.items():
        if used:
            raise UnknownQuantizer(
                f"the lucidrains VectorQuantize at '{path}' uses {name}; that has no counterpart yet"
            )
    codes = module._codebook.embed[0]
    options = dict(
        beta=float(module.commitment_weight),
        channel_dim=1 if module.accept_image_fmap or not module.channel_last else -1,
        ema_decay=None if module.learnable_codebook else float(module._codebook.decay),
    )

    def counterpart() -> nn.Module:
        return _ForLucidrains(_layer_with(codes, **options), module.project_in, module.project_out)

    return Found(path, "lucidrains VectorQuantize", codes, False, counterpart)


def _ours(path: str, module: VectorQuantizer) -> Found:
    odd = {
        f"metric='{module.metric}'": module.metric != "euclidean",
        f"heads={module.heads}": module.heads != 1,
        "projections": module.project_in is not None,
        f"gradient='{getattr(module, 'gradient', '')}'": getattr(module, "gradient", "straight_through")
        != "straight_through",
    }
    for name, used in odd.items():
        if used:
            raise UnknownQuantizer(f"the layer at '{path}' has {name}, which the usual one-hot layer does not have")

    def counterpart() -> nn.Module:
        return OneHotQuantizer(
            module.codebook.detach().clone(), module.beta, channel_dim=module.channel_dim, ema_decay=module.ema_decay
        )

    return Found(path, "vqkernels VectorQuantizer", module.codebook, True, counterpart)


def _protocol(path: str, module: Any) -> Found:
    options = dict(channel_dim=module.channel_dim, beta=float(getattr(module, "beta", 0.25)))
    codes, name = module.codebook, type(module).__name__
    return Found(path, f"{name} (codebook, channel_dim)", codes, False, lambda: _layer_with(codes, **options))


def _keeps_protocol(module: nn.Module) -> bool:
    codebook, axis = getattr(module, "codebook", None), getattr(module, "channel_dim", None)
    return isinstance(codebook, Tensor) and codebook.dim() == 2 and isinstance(axis, int)


def find(model: nn.Module) -> list[Found]:
    """Every quantizer of a model, outermost first. A quantizer inside another one is not listed.

    Raises:
        UnknownQuantizer: one is recognised but cannot be replaced.
    """
    found: list[Found] = []
    for path, module in model.named_modules():
        if any(not x.path or path.startswith(f"{x.path}.") for x in found):
            continue
        if isinstance(module, VectorQuantizer):
            found.append(_ours(path, module))
        elif _is_a(module, "diffusers", "VectorQuantizer"):
            found.append(_diffusers(path, module))
        elif _is_a(module, "vector_quantize_pytorch", "VectorQuantize"):
            found.append(_lucidrains(path, module))
        elif _keeps_protocol(module):
            found.append(_protocol(path, module))
    return found
