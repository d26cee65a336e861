"""Whole models with lucidrains' layers swapped and restored: what stays, and what is left because it would be lost."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin.lucidrains_parity import assert_results_equal, assert_state_equal
from torch import nn

from vqkernels import restore_quantizers, swap_quantizers
from vqkernels.dropin import lucidrains as ours

peer = pytest.importorskip("vector_quantize_pytorch")

SIZES = {"dim": 8, "codebook_size": 20}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "VectorQuantize": lambda: peer.VectorQuantize(**SIZES),
    "projected": lambda: peer.VectorQuantize(**SIZES, codebook_dim=4),
    "ResidualVQ": lambda: peer.ResidualVQ(**SIZES, num_quantizers=3),
    "shared codebook": lambda: peer.ResidualVQ(**SIZES, num_quantizers=3, shared_codebook=True),
    "GroupedResidualVQ": lambda: peer.GroupedResidualVQ(**SIZES, num_quantizers=2, groups=2),
    "SimVQ": lambda: peer.SimVQ(**SIZES),
}
every_layer = pytest.mark.parametrize("case", LAYERS)


class Model(nn.Module):
    """An encoder, one quantizer that stands in two lists, and a decoder."""

    def __init__(self, case: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(8, 6)
        self.stages = nn.ModuleList([nn.Identity(), LAYERS[case]()])
        self.again = nn.ModuleList([self.stages[1]])

    def forward(self, x):
        once = self.stages[1](self.encoder(x))
        twice = self.again[0](once[0])
        return (self.decoder(twice[0]), twice[1], once[2].sum() + twice[2].sum())


def rows(seed: int, **options: Any) -> torch.Tensor:
    return torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(seed)).to(**options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        optimizer.zero_grad()
        x = rows(number)
        reconstruction, _, loss = model(x)
        ((reconstruction - x).square().mean() + loss).backward()
        optimizer.step()


@every_layer
def test_twenty_steps_between_swap_and_restoration_are_those_of_the_peer(case):
    model, twin = Model(case), Model(case)
    optimizers = [torch.optim.Adam(x.parameters(), lr=1e-4) for x in (model, twin)]
    quantizer, keys = model.stages[1], list(model.state_dict())
    assert [x.name for x in swap_quantizers(model, strict=True).swapped] == ["stages.1", "again.0"]
    assert type(model.stages[1]).__module__.startswith("vqkernels.dropin.lucidrains.")
    assert model.stages[1] is model.again[0] and list(model.state_dict()) == keys
    train(model, optimizers[0], range(20))
    restore_quantizers(model)
    assert model.stages[1] is quantizer is model.again[0] and list(model.state_dict()) == keys
    train(model, optimizers[0], range(20, 23))
    train(twin, optimizers[1], range(23))
    assert_state_equal(model, twin, 1e-3, 1e-4)


@every_layer
def test_results_in_eval_mode_are_the_same(case):
    model = Model(case).eval()
    expected = model(rows(0))
    swap_quantizers(model)
    assert not any(module.training for module in model.modules())
    assert_results_equal(model(rows(0)), expected)


@every_layer
def test_a_model_in_bfloat16_goes_on(case):
    """Types of results and Parameters stay, averages learn in float32; which code is chosen may differ, as the peer's
    search rounds to bfloat16."""
    model = Model(case).to(torch.bfloat16)
    with torch.no_grad():
        dtypes = [x.dtype for x in copy.deepcopy(model)(rows(0, dtype=torch.bfloat16))]
    state = {key: value.dtype for key, value in model.state_dict().items()}
    swap_quantizers(model)
    assert {key: value.dtype for key, value in model.state_dict().items()} == state
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False) if "_codebook." in name}
    state = {key: torch.float32 if key in buffers and dtype.itemsize == 2 else dtype for key, dtype in state.items()}
    results = model(rows(0, dtype=torch.bfloat16))
    results[2].backward()
    assert results[0].dtype == dtypes[0] and results[1].dtype == dtypes[1] and results[2].isfinite()
    assert {key: value.dtype for key, value in model.state_dict().items()} == state
    restore_quantizers(model)
    assert model(rows(0, dtype=torch.bfloat16))[0].isfinite().all()


@every_layer
def test_copies_and_pickles_train_and_are_restored(case):
    model = Model(case)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    swap_quantizers(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), range(2))
        learned = copy.deepcopy(other.state_dict())
        restore_quantizers(other)
        assert type(other.stages[1]).__module__.startswith("vector_quantize_pytorch.")
        assert other.stages[1] is other.again[0]
        assert all(value.equal(learned[key]) for key, value in other.state_dict().items())
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


@every_layer
def test_hooks_and_attributes_of_the_layer_stay(case):
    model, seen = Model(case), []
    handle = model.stages[1].register_forward_hook(lambda *_: seen.append(1))
    model.stages[1].mark = "mine"
    swap_quantizers(model)
    model(rows(0))
    assert seen == [1, 1] and model.stages[1].mark == "mine"
    model.stages[1].mark = "new"
    handle.remove()
    model(rows(0))
    restore_quantizers(model)
    model(rows(0))
    assert seen == [1, 1] and model.stages[1].mark == "new"


@pytest.mark.parametrize(
    "case,name,told",
    [
        ("VectorQuantize", "_codebook", "_codebook"),
        ("VectorQuantize", "project_in", "project_in"),
        ("ResidualVQ", "layers.1", "layers.1"),
        ("ResidualVQ", "layers.1._codebook", "_codebook"),
        ("shared codebook", "layers.2", "layers.2"),
        ("GroupedResidualVQ", "rvqs.1", "rvqs.1"),
        ("GroupedResidualVQ", "rvqs.1.layers.0", "layers.0"),
    ],
)
def test_a_part_with_hooks_that_would_not_be_called_is_named(case, name, told):
    model, seen = Model(case), []
    quantizer = model.stages[1]
    quantizer.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(ValueError, match=f"its module '{told}' has hooks"):
        swap_quantizers(model, strict=True)
    report = swap_quantizers(model)
    assert [x.reason for x in report.left] == 2 * [f"its module '{told}' has hooks, which would not be called"]
    assert model.stages[1] is quantizer
    model(rows(0))
    assert seen


def test_hooks_of_parts_that_are_called_stay():
    model, seen = nn.Sequential(LAYERS["projected"](), LAYERS["SimVQ"]()), []
    for part in (model[0].project_in, model[0].project_out, model[1].code_transform):
        part.register_forward_hook(lambda module, *_: seen.append(module))
    assert len(swap_quantizers(model, strict=True)) == 2
    for layer in model:
        layer(torch.randn(2, 30, 8))
    assert seen == [model[0].project_in, model[0].project_out, model[1].code_transform]


class MyCodebook(nn.Module):
    pass


class MyQuantize(peer.VectorQuantize):
    pass


def _with_forward(layer: nn.Module) -> None:
    layer.forward = lambda *_, **__: None


ALTERED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "forward": ("VectorQuantize", _with_forward, "its forward is replaced on the instance"),
    "inner forward": ("ResidualVQ", lambda x: _with_forward(x.layers[1]), "the forward of its module 'layers.1' is"),
    "codebook's forward": ("VectorQuantize", lambda x: _with_forward(x._codebook), "the forward of its module '_code"),
    "codebook of one's own": (
        "VectorQuantize",
        lambda x: setattr(x, "_codebook", MyCodebook()),
        "its module '_codebook' is a MyCodebook, a class of another package",
    ),
    "level of one's own": (
        "ResidualVQ",
        lambda x: x.layers.__setitem__(0, MyQuantize(**SIZES)),
        "its module 'layers.0' is a MyQuantize, a class of another package",
    ),
    "a buffer more": (
        "SimVQ",
        lambda x: x.register_buffer("extra", torch.zeros(2)),
        "its tensor 'extra' was added: the class does not have it",
    ),
    "a part more": (
        "ResidualVQ",
        lambda x: x.add_module("extra", nn.Linear(2, 2)),
        "its tensor 'extra.weight' was added: the class does not have it",
    ),
    "a frozen codebook by its mode": (
        "VectorQuantize",
        lambda x: x._codebook.eval(),
        "its module '_codebook' is in another training mode than the layer",
    ),
    "a level's codebook": (
        "ResidualVQ",
        lambda x: x.layers[2]._codebook.eval(),
        "its module '_codebook' is in another training mode than the layer",
    ),
}


@pytest.mark.parametrize("alteration", ALTERED)
def test_a_layer_that_was_altered_is_left_with_the_reason(alteration):
    case, alter, reason = ALTERED[alteration]
    model = nn.Sequential(LAYERS[case](), LAYERS[case]())
    first, second = model
    alter(first)
    with pytest.raises(ValueError, match="strict=True, and nothing was replaced"):
        swap_quantizers(model, strict=True)
    assert list(model) == [first, second]
    report = swap_quantizers(model)
    assert [x.name for x in report.left] == ["0"] and report.left[0].reason.startswith(reason)
    assert model[0] is first and model[1] is not second
    restore_quantizers(model)
    assert list(model) == [first, second]


def test_a_subclass_is_left():
    model = nn.Sequential(MyQuantize(**SIZES))
    assert "a subclass of vector_quantize_pytorch" in swap_quantizers(model).left[0].reason


def test_layers_that_share_a_codebook_are_left():
    """Ours would each have one of their own, over the same tensors until a cast parts them."""
    model = nn.Sequential(LAYERS["VectorQuantize"](), LAYERS["VectorQuantize"](), LAYERS["VectorQuantize"]())
    model[1]._codebook = model[0]._codebook
    report = swap_quantizers(model)
    assert [x.name for x in report.left] == ["0", "1"] and [x.name for x in report.swapped] == ["2"]
    assert all("its module '_codebook' is part of another quantizer too" in x.reason for x in report.left)


def test_what_was_set_while_it_was_swapped_comes_back():
    model = nn.Sequential(LAYERS["VectorQuantize"]())
    theirs = model[0]
    swap_quantizers(model)
    model[0]._codebook.decay, model[0].commitment_weight = 0.5, 0.25
    model.eval()
    restore_quantizers(model)
    assert theirs._codebook.decay == 0.5 and theirs.commitment_weight == 0.25
    assert not theirs.training and not theirs._codebook.training


def test_a_level_keeps_its_own_mode():
    model = nn.Sequential(LAYERS["ResidualVQ"]())
    model[0].layers[1].eval()
    swap_quantizers(model)
    modes = [layer.training for layer in model[0].layers]
    model[0].layers[2].eval()
    restore_quantizers(model)
    assert modes == [True, False, True] and [x.training for x in model[0].layers] == [True, False, False]
    assert [x._codebook.training for x in model[0].layers] == [True, False, False]


def test_a_model_that_holds_both_kinds_is_swapped_whole():
    diffusers = pytest.importorskip("diffusers.models.autoencoders.vae")
    model = nn.Sequential(LAYERS["SimVQ"](), diffusers.VectorQuantizer(16, 8, beta=0.25))
    assert len(swap_quantizers(model, strict=True).swapped) == 2
    assert isinstance(model[0], ours.SimVQ) and type(model[1]).__module__ == "vqkernels.dropin.diffusers"
