"""What takes the place of the quantizers of a user's model, so that both can be timed.

A layer of this package is replaced by the usual one-hot layer; every quantizer that `swap_quantizers` knows by its
drop-in; and a module that keeps this protocol by our layer: a tensor `codebook` of shape (K, D), an int `channel_dim`
that names z's channel axis, and `forward(z)` that returns (quantized, indices, loss); optionally a float `beta`.
"""

from typing import Any

from torch import Tensor, nn

from vqkernels.dropin.swap import Entry, Report, swap_quantizers
from vqkernels.nn import VectorQuantizer

from .layers import OneHotQuantizer
from .user_model import ModelError

OURS = "vqkernels VectorQuantizer"
_PEERS = {"vector_quantize_pytorch": "lucidrains"}  # packages that are called otherwise
_CODES = ("codebook", "embedding.weight", "_codebook.embed", "codebook.weight", "embed")  # where peers keep them


def replace(holder: nn.Module) -> Report:
    """Replaces every quantizer below a module, in place.

    Returns:
        One entry for each, by its path.

    Raises:
        ModelError: there is none, one has no counterpart, or layers of ours are mixed with others.
    """
    report, places = Report(), []
    for path, module in holder.named_modules():
        if any(path.startswith(f"{entry.name}.") for entry in report):
            continue  # it belongs to the quantizer around it
        if isinstance(module, VectorQuantizer):
            kind = OURS
        elif _keeps_protocol(module):
            kind = f"{type(module).__name__} (codebook, channel_dim)"
        else:
            continue
        counterpart = _one_hot(path, module) if isinstance(module, VectorQuantizer) else _layer(module)
        report.append(Entry(path, kind, type(counterpart).__name__))
        places.append((path, counterpart))
    for path, counterpart in places:
        parent, _, name = path.rpartition(".")
        setattr(holder.get_submodule(parent), name, counterpart)
    for entry in (peers := swap_quantizers(holder)):
        package, _, rest = entry.old.partition(".")
        kind = f"{_PEERS.get(package, package)} {rest.rpartition('.')[2]}"
        report.append(Entry(entry.name, kind, entry.new, entry.reason))
    if peers.left:
        raise ModelError(f"the quantizer at '{peers.left[0].name}' has no counterpart here: {peers.left[0].reason}")
    if not report.swapped:
        raise ModelError("no quantizer was found in the model: --help says which are known")
    if len({entry.old == OURS for entry in report.swapped}) > 1:
        raise ModelError("the model mixes layers of vqkernels with others: leave one kind")
    return report


def size(quantizer: nn.Module) -> tuple[int, int] | None:
    """K and D of a quantizer's codes; None where it is not known which tensor they are."""
    for path in _CODES:
        found: Any = quantizer
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, Tensor) and found.dim() >= 2:
            return found.shape[-2], found.shape[-1]
    return None


def _keeps_protocol(module: nn.Module) -> bool:
    codebook, axis = getattr(module, "codebook", None), getattr(module, "channel_dim", None)
    return isinstance(codebook, Tensor) and codebook.dim() == 2 and isinstance(axis, int)


def _layer(module: Any) -> VectorQuantizer:
    size, dim = module.codebook.shape
    beta = float(getattr(module, "beta", 0.25))
    layer = VectorQuantizer(dim, size, channel_dim=module.channel_dim, beta=beta).to(module.codebook.device)
    layer.codebook.data.copy_(module.codebook.detach())
    return layer.train(module.training)


def _one_hot(path: str, module: VectorQuantizer) -> OneHotQuantizer:
    gradient = getattr(module, "gradient", "straight_through")
    odd = {
        f"metric='{module.metric}'": module.metric != "euclidean",
        f"heads={module.heads}": module.heads != 1,
        "projections": module.project_in is not None,
        f"gradient='{gradient}'": gradient != "straight_through",
    }
    for name, used in odd.items():
        if used:
            raise ModelError(f"the layer at '{path}' has {name}, which the usual one-hot layer has not")
    codes = module.codebook.detach().clone()
    layer = OneHotQuantizer(codes, module.beta, channel_dim=module.channel_dim, ema_decay=module.ema_decay)
    return layer.train(module.training)
