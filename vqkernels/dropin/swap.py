"""Replaces every known quantizer of a finished model in place, and puts it back. Weights, optimizer and hooks stay.

A peer's class is recognised by its full name, so no peer is imported. The new layer has the Parameters and buffers of
the peer's; nothing is copied or allocated. The new layer keeps the replaced instance. So a model can be restored at any
time, also after it was trained, copied or pickled.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import dac, diffusers, encodec, llamagen, lucidrains, mimi, pytorch_vqvae, rosinality, taming
from .adoption import share_hooks

_FILES: tuple[Any, ...] = (
    lucidrains,
    taming,
    diffusers,
    rosinality,
    encodec,
    dac,
    mimi,
    llamagen,
    pytorch_vqvae,
)
ADAPTERS = {name: adopt for file in _FILES for name, adopt in file.ADAPTERS.items()}
RELEASERS = {name: release for file in _FILES for name, release in file.RELEASERS.items()}

_LUCIDRAINS = "vector_quantize_pytorch"
_NEMO = "nemo.collections.tts.modules.audio_codec_modules"
_COSMOS = "cosmos_tokenizer.modules.quantizers"
# Quantizers that round or take signs: they have no codebook to search.
WITHOUT_SEARCH = frozenset(
    {
        f"{_LUCIDRAINS}.finite_scalar_quantization.FSQ",
        f"{_LUCIDRAINS}.residual_fsq.ResidualFSQ",
        f"{_LUCIDRAINS}.residual_fsq.GroupedResidualFSQ",
        f"{_LUCIDRAINS}.lookup_free_quantization.LFQ",
        f"{_LUCIDRAINS}.evo_lookup_free_quantization.EvoLFQ",
        f"{_LUCIDRAINS}.residual_lfq.ResidualLFQ",
        f"{_LUCIDRAINS}.residual_lfq.GroupedResidualLFQ",
        f"{_LUCIDRAINS}.binary_mapper.BinaryMapper",
        "transformers.models.xcodec2.modeling_xcodec2.Xcodec2FiniteScalarQuantization",
        "transformers.models.neucodec.modeling_neucodec.NeuCodecFiniteScalarQuantization",
        "diffusers.models.autoencoders.autoencoder_vidtok.FSQRegularizer",
        f"{_COSMOS}.FSQuantizer",
        f"{_COSMOS}.ResidualFSQuantizer",
        f"{_COSMOS}.LFQuantizer",
        f"{_NEMO}.FiniteScalarQuantizer",
        f"{_NEMO}.GroupFiniteScalarQuantizer",
        "transcoder.models.quantizer.bsq.BinarySphericalQuantizer",
    }
)
_NOTHING_TO_SWAP = "needs no search: nothing to swap"

_REPLACED = "_vqkernels_replaced"  # in the new layer's __dict__, where no walk over modules finds it


@dataclass(frozen=True)
class Entry:
    """One quantizer: its name in the model, its class before and now; if `new` is None, why it was left as it is."""

    name: str
    old: str
    new: str | None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.old} -> {self.new}" if self.new else f"{self.name}: {self.old} left: {self.reason}"


class Report(list[Entry]):
    """The quantizers of a model in the order of its modules; as text, one line each."""

    @property
    def swapped(self) -> list[Entry]:
        """Those that were replaced."""
        return [entry for entry in self if entry.new is not None]

    @property
    def left(self) -> list[Entry]:
        """Those that search and were left as they are."""
        return [entry for entry in self if entry.new is None and entry.reason != _NOTHING_TO_SWAP]

    @property
    def searchless(self) -> list[Entry]:
        """Those that need no search, like FSQ, LFQ and BSQ: there is nothing to swap."""
        return [entry for entry in self if entry.reason == _NOTHING_TO_SWAP]

    def __str__(self) -> str:
        return "\n".join(map(str, self)) if self else "no known quantizer"


def swap_quantizers(model: nn.Module, *, strict: bool = False) -> Report:
    """Replaces every known quantizer inside `model`, in place, by the layer of `vqkernels.dropin` that does the same.

    Parameters and buffers stay the same objects, so optimizers, schedules and averaged copies continue. Training mode,
    dtype, device, hooks and the keys of the state dict stay. `docs/swap.md` lists what changes, peer by peer.

    Args:
        model: any module that contains quantizers of the libraries in `vqkernels/dropin`. A quantizer that is
            referenced in several places is replaced by one layer in all of them. References outside the tree of
            modules (a list, a closure) still point to the peer's instance.
        strict: raise if a quantizer would be left as it is, or if there is none; the model does not change then. A
            quantizer that needs no search counts as one, and is no reason to raise.

    Returns:
        One entry per quantizer. A quantizer with an option that has no counterpart is left as it is, and its entry
        names the option. The entry of one that rounds or takes signs (FSQ, LFQ, BSQ) says that it needs no search.

    Raises:
        ValueError: `model` is itself a quantizer, and so has no parent in which it could be replaced; or see `strict`.
        TypeError: `model` is not a module.
    """
    _check_root(model, ADAPTERS)
    if _is_searchless(model):
        return Report([Entry("model", _name(type(model)), None, _NOTHING_TO_SWAP)])
    report, places = Report(), []
    layers: dict[int, nn.Module | str] = {}
    peers: list[nn.Module] = []
    found: list[tuple[str, nn.Module, str, nn.Module]] = []
    for name, parent, key, peer in _children(model, ""):
        if _is_searchless(peer):
            layers[id(peer)] = _NOTHING_TO_SWAP
            found.append((name, parent, key, peer))
            continue
        known = _known(peer)
        if known is None:
            continue
        full_name, exact = known
        if id(peer) not in layers:
            layers[id(peer)] = _adopt(peer, full_name, exact)
            peers.append(peer)
        found.append((name, parent, key, peer))
    _leave_joined(peers, layers)
    for name, parent, key, peer in found:
        layer = layers[id(peer)]
        if isinstance(layer, str):
            report.append(Entry(name, _name(type(peer)), None, layer))
        else:
            report.append(Entry(name, _name(type(peer)), _name(type(layer))))
            places.append((parent, key, layer))
    if strict and (report.left or not report):
        raise ValueError(f"strict=True, and nothing was replaced: {'; '.join(map(str, report.left)) or report}")
    for parent, key, layer in places:
        parent._modules[key] = layer
    return report


def restore_quantizers(model: nn.Module) -> Report:
    """Puts the quantizers back that `swap_quantizers` replaced in `model`, with everything learned since.

    Returns:
        One entry per layer, from the drop-in class to the peer's.

    Raises:
        ValueError: `model` is itself a layer that was swapped in: pass the model around it.
        TypeError: `model` is not a module.
    """
    _check_root(model, {})
    report, places = Report(), []
    for name, parent, key, layer in _children(model, ""):
        peer = layer.__dict__.get(_REPLACED)
        if peer is not None:
            report.append(Entry(name, _name(type(layer)), _name(type(peer))))
            places.append((parent, key, layer, peer))
    for parent, key, layer, peer in places:
        if layer.__dict__.pop(_REPLACED, None) is not None:
            RELEASERS[_name(type(peer))](layer, peer)
            share_hooks(layer, peer)
        parent._modules[key] = peer
    return report


def _children(
    module: nn.Module, prefix: str, seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every place of a module below `module`, once each: full name, parent, key, module.

    Modules inside a quantizer are not visited.
    """
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    for key, child in module._modules.items():
        if child is None:
            continue
        name = f"{prefix}{key}"
        yield name, module, key, child
        if _known(child) is None and not _is_searchless(child) and _REPLACED not in child.__dict__:
            yield from _children(child, f"{name}.", seen)


def _adopt(peer: nn.Module, full_name: str, exact: bool) -> nn.Module | str:
    """The layer that replaces `peer`, or the reason why there is none."""
    if not exact:
        return f"a subclass of {full_name}, which may do other things"
    for name, what in (("forward", "its forward is replaced"), ("_compiled_call_impl", "its call is compiled")):
        if peer.__dict__.get(name) is not None:
            return f"{what} on the instance"
    try:
        layer = ADAPTERS[full_name](peer)
    except ValueError as error:
        return str(error)
    share_hooks(peer, layer)
    layer.__dict__[_REPLACED] = peer
    return layer


def _leave_joined(peers: list[nn.Module], layers: dict[int, nn.Module | str]) -> None:
    """Leaves quantizers that share a part, if each of our layers would have its copy: the copies would differ."""
    held: dict[int, list[tuple[nn.Module, str]]] = {}
    for peer in peers:
        layer = layers[id(peer)]
        kept = set() if isinstance(layer, str) else {id(part) for part in layer.modules()}
        for name, part in peer.named_modules():
            if part is not peer and id(part) not in kept:
                held.setdefault(id(part), []).append((peer, name))
    for owners in held.values():
        for peer, name in owners:
            if len(owners) > 1 and not isinstance(layers[id(peer)], str):
                layers[id(peer)] = f"its module '{name}' is part of another quantizer too"


def _known(module: nn.Module) -> tuple[str, bool] | None:
    """The full name of the peer's class of a module, and False for a subclass of it; None if it has no such class."""
    for place, base in enumerate(type(module).__mro__):
        if _name(base) in ADAPTERS:
            return _name(base), place == 0
    return None


def _is_searchless(module: nn.Module) -> bool:
    return any(_name(base) in WITHOUT_SEARCH for base in type(module).__mro__)


def _check_root(model: Any, known: dict[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if _name(type(model)) in known or _REPLACED in model.__dict__:
        raise ValueError(
            f"model is itself a quantizer, {_name(type(model))}, and cannot be replaced in place: pass the module that "
            "holds it, or wrap it in nn.Sequential"
        )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
