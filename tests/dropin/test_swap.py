"""`swap_quantizers` and `restore_quantizers` on any module: what is kept, what is reported, what is refused."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

import vqkernels
from vqkernels import restore_quantizers, swap_quantizers
from vqkernels.dropin import swap
from vqkernels.dropin.diffusers import VectorQuantizer as Ours

pytest.importorskip("diffusers")
from diffusers.models.autoencoders.vae import VectorQuantizer as Peer

NAME = "diffusers.models.autoencoders.vae.VectorQuantizer"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList([nn.Identity(), Peer(16, 4, beta=0.25)])

    def forward(self, x):
        return self.blocks[1](self.conv(x))


class Changed(Peer):
    pass


def hooked(model: nn.Module, seen: list[str]):
    layer = model.blocks[1]
    return [
        layer.register_forward_pre_hook(lambda m, a: seen.append("before")),
        layer.register_forward_hook(lambda m, a, out: seen.append("after")),
        layer.register_forward_hook(lambda m, a, k, out: seen.append("with kwargs"), with_kwargs=True),
        layer.register_full_backward_hook(lambda m, a, b: seen.append("backward")),
    ]


def run(model: nn.Module):
    quantized, loss, _ = model(torch.ones(1, 3, 2, 2))
    (quantized.sum() + loss).backward()


def test_the_names_are_public_and_imported_when_asked_for():
    assert {"swap_quantizers", "restore_quantizers"} <= set(vqkernels.__all__)
    assert vqkernels.swap_quantizers is swap.swap_quantizers
    with pytest.raises(AttributeError, match="no attribute 'swap_quantizer'"):
        vqkernels.swap_quantizer  # noqa: B018


def test_parameters_are_the_same_objects_and_keys_and_modes_stay():
    model = Model().to(torch.float64)
    model.blocks.eval()
    model.blocks[1].mark = "mine"
    parameters, keys = list(model.parameters()), list(model.state_dict())
    peer = model.blocks[1]
    report = swap_quantizers(model)
    layer = model.blocks[1]
    assert type(layer) is Ours and not layer.training and model.conv.training and layer.mark == "mine"
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys and layer.embedding.weight.dtype == torch.float64
    assert str(report) == f"blocks.1: {NAME} -> vqkernels.dropin.diffusers.VectorQuantizer" and report.left == []
    model.train()
    layer.mark = "new"
    assert str(restore_quantizers(model)) == f"blocks.1: vqkernels.dropin.diffusers.VectorQuantizer -> {NAME}"
    assert model.blocks[1] is peer and peer.training and peer.mark == "new"
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert restore_quantizers(model) == []


def test_hooks_are_called_and_removed_before_and_after():
    model, seen = Model(), []
    handles = hooked(model, seen)
    expected = ["before", "after", "with kwargs", "backward"]
    for change in (lambda m: None, swap_quantizers, restore_quantizers, swap_quantizers):
        change(model)
        seen.clear()
        run(model)
        assert seen == expected
    handles[1].remove()
    model.blocks[1].register_forward_hook(lambda m, a, out: seen.append("new"))
    seen.clear()
    run(model)
    restore_quantizers(model)
    run(model)
    assert seen == 2 * ["before", "with kwargs", "new", "backward"]


def test_a_backward_hook_made_after_the_swap_is_a_full_one_after_it_is_undone():
    model, seen = Model(), []
    swap_quantizers(model)
    handle = model.blocks[1].register_full_backward_hook(lambda m, given, taken: seen.append(given[0].shape))
    restore_quantizers(model)
    run(model)
    assert seen == [(1, 4, 2, 2)]
    handle.remove()
    run(model)
    assert len(seen) == 1


def test_nothing_is_drawn():
    model = Model()
    state = torch.get_rng_state()
    swap_quantizers(model)
    restore_quantizers(model)
    assert torch.get_rng_state().equal(state)


def test_a_quantizer_in_two_places_becomes_one_layer_in_both():
    model = nn.Module()
    model.first, model.second = nn.Sequential(Peer(8, 4, beta=0.25)), nn.Module()
    model.second.again = model.first[0]
    model.third = model.first
    peer = model.first[0]
    report = swap_quantizers(model)
    assert [entry.name for entry in report] == ["first.0", "second.again"]
    assert type(model.first[0]) is Ours and model.first[0] is model.second.again is model.third[0]
    assert [entry.name for entry in restore_quantizers(model)] == ["first.0", "second.again"]
    assert model.first[0] is model.second.again is peer


def test_moved_cast_and_loaded_state_comes_back():
    model = Model()
    swap_quantizers(model)
    model.to(torch.float64)
    state = {key: torch.full_like(value, 3.0) for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    restore_quantizers(model)
    weight = model.blocks[1].embedding.weight
    assert weight.dtype == torch.float64 and (weight == 3).all()
    run(model.to(torch.float32))


def test_copies_and_pickles_can_be_restored():
    model = Model()
    swap_quantizers(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.blocks[1].embedding.weight.fill_(2)
        restore_quantizers(other)
        assert type(other.blocks[1]) is Peer and (other.blocks[1].embedding.weight == 2).all()
    assert type(model.blocks[1]) is Ours and not (model.blocks[1].embedding.weight == 2).any()


def test_swapping_twice_changes_nothing_more():
    model = Model()
    swap_quantizers(model)
    layer = model.blocks[1]
    assert str(swap_quantizers(model)) == "no known quantizer" and model.blocks[1] is layer


REFUSED = {
    "subclass": (lambda: Changed(8, 4, beta=0.25), f"a subclass of {NAME}, which may do other things"),
    "forward": (lambda: _with_forward(Peer(8, 4, beta=0.25)), "its forward is replaced on the instance"),
    "compiled": (lambda: _compiled(Peer(8, 4, beta=0.25)), "its call is compiled on the instance"),
    "inner hook": (lambda: _inner_hook(Peer(8, 4, beta=0.25)), "its module 'embedding' has hooks"),
}


def _with_forward(layer):
    layer.forward = lambda z: z
    return layer


def _compiled(layer):
    layer.compile()
    return layer


def _inner_hook(layer):
    layer.embedding.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "compiled" else n for n in REFUSED])
def test_what_is_left_says_why_and_strict_leaves_all(name):
    build, reason = REFUSED[name]
    model = nn.Sequential(build(), Peer(8, 4, beta=0.25))
    peers = list(model)
    with pytest.raises(ValueError, match=r"strict=True, and nothing was replaced: 0: .* left: .*"):
        swap_quantizers(model, strict=True)
    assert list(model) == peers
    report = swap_quantizers(model)
    assert model[0] is peers[0] and type(model[1]) is Ours
    assert [entry.name for entry in report.left] == ["0"] and reason in report.left[0].reason
    assert "0: " in str(report).splitlines()[0] and f"left: {reason}" in str(report).splitlines()[0]
    assert len(restore_quantizers(model)) == 1 and list(model) == peers


def test_models_without_a_quantizer():
    assert str(swap_quantizers(nn.Linear(2, 2))) == "no known quantizer"
    with pytest.raises(ValueError, match="strict=True, and nothing was replaced: no known quantizer"):
        swap_quantizers(nn.Linear(2, 2), strict=True)


def test_a_quantizer_has_no_place_of_its_own():
    layer = Peer(8, 4, beta=0.25)
    with pytest.raises(ValueError, match=r"model is itself a quantizer, diffusers\..*: pass the module that holds it"):
        swap_quantizers(layer)
    model = nn.Sequential(layer)
    swap_quantizers(model)
    with pytest.raises(ValueError, match="model is itself a quantizer"):
        restore_quantizers(model[0])
    for function in (swap_quantizers, restore_quantizers):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
            function({})


def test_every_adapter_can_be_released():
    assert set(swap.ADAPTERS) == set(swap.RELEASERS)


def test_layers_that_need_no_search_are_named_in_their_place():
    peer = pytest.importorskip("vector_quantize_pytorch")
    model = nn.Sequential(
        peer.FSQ([4, 4]),
        peer.VectorQuantize(dim=4, codebook_size=8),
        nn.Sequential(peer.ResidualFSQ(levels=[3, 3], num_quantizers=2, dim=2), peer.LFQ(codebook_size=8)),
        peer.GroupedResidualLFQ(dim=6, groups=2, codebook_size=8, num_quantizers=2),
    )
    report = swap_quantizers(model, strict=True)
    assert [entry.name for entry in report] == ["0", "1", "2.0", "2.1", "3"] and not report.left
    assert [entry.name for entry in report.searchless] == ["0", "2.0", "2.1", "3"]
    assert str(report[0]).endswith("FSQ left: needs no search: nothing to swap")
    assert str(swap_quantizers(model[0], strict=True)).endswith("needs no search: nothing to swap")


def test_every_class_without_search_that_is_installed_exists():
    for name in sorted(swap.WITHOUT_SEARCH):
        module, _, kind = name.rpartition(".")
        if module.split(".")[0] in ("vector_quantize_pytorch", "transformers", "diffusers"):
            pytest.importorskip(module.split(".")[0])
            assert issubclass(getattr(importlib.import_module(module), kind), nn.Module)
