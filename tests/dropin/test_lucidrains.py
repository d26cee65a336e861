"""Parity of `VectorQuantize` with the real vector-quantize-pytorch: same weights, same input, same training."""

import copy
import inspect
from typing import Any

import pytest
import torch
from dropin.lucidrains_parity import (
    assert_gradients_equal,
    assert_results_equal,
    assert_state_equal,
    batch,
    objective,
)
from torch.nn import functional as F

from vqkernels.dropin.lucidrains import VectorQuantize

peer = pytest.importorskip("vector_quantize_pytorch")

# Name: arguments of the layer, shape of x, arguments of the call.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], dict[str, Any]]] = {
    "defaults": ({}, (2, 150, 8), {}),
    "one token": ({}, (40, 8), {}),
    "straight-through": ({"rotation_trick": False}, (2, 60, 8), {}),
    "one channel": ({"dim": 1}, (2, 60, 1), {}),
    "codebook_dim": ({"codebook_dim": 3}, (2, 60, 8), {}),
    "layernorm": ({"codebook_dim": 3, "layernorm_after_project_in": True}, (2, 60, 8), {}),
    "cosine": ({"use_cosine_sim": True}, (2, 60, 8), {}),
    "cosine codebook_dim": ({"use_cosine_sim": True, "codebook_dim": 4}, (2, 60, 8), {}),
    "heads": ({"heads": 2, "codebook_dim": 4}, (2, 60, 8), {}),
    "heads projected": ({"heads": 3, "codebook_dim": 2}, (2, 60, 8), {}),
    "separate heads": ({"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}, (2, 60, 8), {}),
    "separate head": ({"separate_codebook_per_head": True}, (2, 60, 8), {}),
    "image": ({"accept_image_fmap": True}, (2, 8, 5, 7), {}),
    "image projected": ({"accept_image_fmap": True, "codebook_dim": 4}, (2, 8, 5, 7), {}),
    "image separate heads": (
        {"accept_image_fmap": True, "heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
        (2, 8, 5, 7),
        {},
    ),
    "image heads": ({"accept_image_fmap": True, "heads": 2, "codebook_dim": 4}, (2, 8, 5, 7), {}),
    "volume": ({"accept_3d_fmap": True}, (2, 8, 3, 4, 5), {}),
    "channels first": ({"channel_last": False}, (2, 8, 60), {}),
    "channels first cosine heads": (
        {"channel_last": False, "use_cosine_sim": True, "heads": 2, "codebook_dim": 4},
        (2, 8, 60),
        {},
    ),
    "learnable": ({"learnable_codebook": True, "ema_update": False}, (2, 60, 8), {}),
    "learnable separate": (
        {
            "learnable_codebook": True,
            "ema_update": False,
            "heads": 2,
            "codebook_dim": 4,
            "separate_codebook_per_head": True,
        },
        (2, 60, 8),
        {},
    ),
    "learnable frozen": ({"learnable_codebook": True, "ema_update": False}, (2, 60, 8), {"freeze_codebook": True}),
    "synchronous update": (
        {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.3},
        (2, 60, 8),
        {},
    ),
    "gradients not routed": (
        {"learnable_codebook": True, "ema_update": False, "route_gradients_to_input": False},
        (2, 60, 8),
        {},
    ),
    "no ema": ({"ema_update": False}, (2, 60, 8), {}),
    "frozen": ({"freeze_codebook": True}, (2, 60, 8), {}),
    "frozen in the call": ({}, (2, 60, 8), {"freeze_codebook": True}),
    "thawed in the call": ({"freeze_codebook": True}, (2, 60, 8), {"freeze_codebook": False}),
    "manual": ({"manual_ema_update": True}, (2, 60, 8), {}),
    "commitment": ({"commitment_weight": 0.3, "decay": 0.95, "eps": 1e-3}, (2, 60, 8), {}),
    "no commitment": ({"commitment_weight": 0.0}, (2, 60, 8), {}),
    "orthogonal": ({"orthogonal_reg_weight": 10.0}, (2, 60, 8), {}),
    "orthogonal heads": (
        {"orthogonal_reg_weight": 10.0, "heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
        (2, 60, 8),
        {},
    ),
    "orthogonal active": ({"orthogonal_reg_weight": 3.0, "orthogonal_reg_active_codes_only": True}, (2, 5, 8), {}),
    "cross entropy": ({"commitment_use_cross_entropy_loss": True}, (2, 60, 8), {"freeze_codebook": True}),
    "cross entropy heads": (
        {"commitment_use_cross_entropy_loss": True, "heads": 2, "codebook_dim": 4},
        (2, 60, 8),
        {"freeze_codebook": True},
    ),
    "cross entropy learnable": (
        {"commitment_use_cross_entropy_loss": True, "learnable_codebook": True, "ema_update": False},
        (2, 60, 8),
        {},
    ),
    "lens": ({}, (2, 60, 8), {"lens": torch.tensor([60, 17])}),
    "mask": ({}, (2, 60, 8), {"mask": torch.arange(120).view(2, 60) % 3 > 0}),
    "mask cosine": ({"use_cosine_sim": True}, (2, 60, 8), {"mask": torch.arange(120).view(2, 60) % 3 > 0}),
    "mask learnable": (
        {"learnable_codebook": True, "ema_update": False},
        (2, 60, 8),
        {"mask": torch.arange(120).view(2, 60) % 3 > 0},
    ),
    "mask keeps the input": (
        {"return_zeros_for_masked_padding": False},
        (2, 60, 8),
        {"mask": torch.arange(120).view(2, 60) % 3 > 0},
    ),
    "channels first mask": (
        {"channel_last": False},
        (2, 8, 60),
        {"mask": torch.arange(120).view(2, 60) % 3 > 0},
    ),
    "weighted update": ({}, (2, 60, 8), {"ema_update_weight": torch.linspace(0, 1, 20)}),
    "no update in the call": ({}, (2, 60, 8), {"ema_update": False}),
    "double": ({"double": True}, (2, 60, 8), {}),
}


def pair(arguments: dict[str, Any]) -> tuple[VectorQuantize, Any]:
    """Our layer and the peer's, both built from the same random numbers."""
    arguments = {"dim": 8, "codebook_size": 20} | arguments
    double = arguments.pop("double", False)
    torch.manual_seed(1)
    ours = VectorQuantize(**arguments)
    torch.manual_seed(1)
    theirs = peer.VectorQuantize(**arguments)
    return (ours.double(), theirs.double()) if double else (ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_a_training_step(case):
    arguments, shape, call = CASES[case]
    ours, theirs = pair(arguments)
    assert_state_equal(ours, theirs, 0, 0)
    x, y = batch(shape, 0, arguments)
    one, other = ours(x, **call), theirs(y, **call)
    assert_results_equal(one, other)
    assert one[2].requires_grad
    objective(one).backward()
    objective(other).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    assert_gradients_equal(ours, theirs, atol=1e-5)
    assert_state_equal(ours, theirs)


@pytest.mark.parametrize("case", ["defaults", "codebook_dim", "learnable", "orthogonal", "mask learnable"])
def test_an_input_without_a_gradient(case):
    """Then nothing is routed by rotation: a learnable codebook gets the output's gradient, a projection the loss's."""
    arguments, shape, call = CASES[case]
    ours, theirs = pair(arguments)
    x = batch(shape, 0, arguments)[0].detach()
    one, other = ours(x, **call), theirs(x, **call)
    assert_results_equal(one, other)
    objective(one).backward()
    objective(other).backward()
    assert_gradients_equal(ours, theirs, atol=1e-5)
    with torch.no_grad():
        assert_results_equal(ours(x, **call), theirs(x, **call))
    assert_state_equal(ours, theirs)


@pytest.mark.parametrize("case", ["defaults", "codebook_dim", "cosine", "separate heads"])
@pytest.mark.parametrize("training", [True, False])
def test_rows_of_bfloat16(case, training):
    """The same types and codes and, as far as bfloat16 goes, values."""
    arguments, shape, _ = CASES[case]
    ours, theirs = (layer.train(training) for layer in pair(arguments))
    if ours.has_projections:  # a float32 projection takes no bfloat16 rows
        for layer in (ours, theirs):
            layer.project_in.bfloat16(), layer.project_out.bfloat16()
    x, y = (z.detach().bfloat16().requires_grad_() for z in batch(shape, 0, arguments))
    one, other = ours(x), theirs(y)
    assert_results_equal(one, other, 2e-2, 2e-2)
    assert one[1].equal(other[1])
    if training:
        objective(one).backward()
        objective(other).backward()
        torch.testing.assert_close(x.grad.float(), y.grad.float(), rtol=5e-2, atol=5e-2)
    assert_state_equal(ours, theirs, 1e-2, 1e-2)


@pytest.mark.parametrize("case", ["defaults", "codebook_dim", "cosine", "separate heads"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(case, training):
    """On the CPU the peer's distances are then bfloat16: its codes are compared only where it finds the same."""
    arguments, shape, _ = CASES[case]
    ours, theirs = (layer.train(training) for layer in pair(arguments))
    exact = copy.deepcopy(ours)(batch(shape, 0, arguments)[0])
    x, y = batch(shape, 0, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one, other = ours(x), theirs(y)
    for mine, its in zip(one, other, strict=True):
        assert mine.shape == its.shape and mine.dtype == its.dtype and mine.requires_grad == its.requires_grad
    same = (one[1] == other[1]).view(*shape[:2], -1).all(-1)
    assert same.float().mean() > 0.95
    torch.testing.assert_close(one[0][same], other[0][same], rtol=2e-2, atol=2e-2)
    if not ours.has_projections:
        assert_results_equal(one, exact, 0, 0)


@pytest.mark.parametrize("case", CASES)
def test_eval(case):
    arguments, shape, call = CASES[case]
    ours, theirs = (layer.eval() for layer in pair(arguments))
    x, y = batch(shape, 0, arguments)
    one, other = ours(x, **call), theirs(y, **call)
    assert_results_equal(one, other)
    assert one[2] == 0 and not one[2].requires_grad
    assert_state_equal(ours, theirs, 0, 0)


@pytest.mark.parametrize("case", CASES)
def test_codes_of_indices(case):
    arguments, shape, call = CASES[case]
    ours, theirs = (layer.eval() for layer in pair(arguments))
    quantized, indices, _ = ours(batch(shape, 0, arguments)[0])
    torch.testing.assert_close(ours.codebook, theirs.codebook)
    if arguments.get("heads", 1) == 1 and not arguments.get("separate_codebook_per_head"):
        torch.testing.assert_close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    elif arguments.get("heads", 1) > 1:
        torch.testing.assert_close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    torch.testing.assert_close(ours.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("case", ["defaults", "cosine", "codebook_dim", "separate heads", "image", "mask", "learnable"])
def test_twenty_steps(case):
    """Encoder, quantizer and optimizer: losses, buffers and weights stay together."""
    arguments, shape, call = CASES[case]
    runs = []
    for layer in pair(arguments):
        scale = torch.nn.Parameter(torch.ones(8))
        optimizer = torch.optim.SGD([scale, *layer.parameters()], lr=0.1)
        losses = []
        for step in range(20):
            x = batch(shape, step, arguments)[0].detach()
            quantized, _, loss = layer(x * scale.view(-1, 1, 1) if x.dim() == 4 else x * scale, **call)
            total = F.mse_loss(quantized, x) + loss
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.detach())
        runs.append((layer, scale, torch.stack(losses)))
    (ours, scale, losses), (theirs, other_scale, other_losses) = runs
    torch.testing.assert_close(losses, other_losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale, other_scale, rtol=1e-4, atol=1e-5)
    assert_state_equal(ours, theirs, 1e-3, 1e-4)


def test_indices_of_many_rows_differ_only_where_float64_says_so():
    ours, theirs = pair({"codebook_size": 512, "dim": 16})
    x = torch.randn(4, 1000, 16)
    one, other = ours.eval()(x)[1], theirs.eval()(x)[1]
    differ = one != other
    assert differ.sum() <= 4  # 0.1 %
    codes = ours.codebook.double()
    distance = [(x[differ].double() - codes[found[differ]]).square().sum(-1) for found in (one, other)]
    assert (distance[0] <= distance[1]).all()


@pytest.mark.parametrize("case", ["defaults", "codebook_dim", "layernorm", "separate heads", "learnable", "orthogonal"])
def test_a_checkpoint_of_either_loads_in_the_other(case, tmp_path):
    arguments, shape, call = CASES[case]
    ours, theirs = pair(arguments)
    for layer in (ours, theirs):
        layer(torch.randn(shape))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    fresh, other_fresh = pair(arguments)
    fresh.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=True), strict=True)
    other_fresh.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True), strict=True)
    x, y = batch(shape, 3, arguments)
    assert_results_equal(fresh(x), theirs(y))
    assert_state_equal(fresh, theirs)
    assert_results_equal(ours(x), other_fresh(y))
    assert_state_equal(ours, other_fresh)


def test_the_state_of_a_kmeans_layer_travels():
    ours, theirs = pair({"kmeans_init": True})
    assert_state_equal(ours, theirs, 0, 0)
    assert not ours._codebook.initted
    theirs(torch.randn(3, 50, 8))
    ours.load_state_dict(theirs.state_dict())
    x, y = batch((2, 60, 8), 0, {})
    assert_results_equal(ours(x), theirs(y))  # without another k-means
    assert_state_equal(ours, theirs)


@pytest.mark.parametrize(
    "case", ["defaults", "cosine", "codebook_dim", "heads", "separate heads", "image", "learnable"]
)
@pytest.mark.parametrize("training", [True, False])
def test_cross_entropy_with_given_codes(case, training):
    arguments, shape, _ = CASES[case]
    ours, theirs = (layer.train(training) for layer in pair(arguments))
    x, y = batch(shape, 0, arguments)
    shaped = copy.deepcopy(ours).eval()(x)[1]
    given = torch.randint(0, 20, shaped.shape)
    given.view(-1)[::5] = -1
    flat = given.flatten(1, 2) if "image" in case else given
    one, other = ours(x, indices=given, freeze_codebook=True), theirs(y, indices=flat, freeze_codebook=True)
    assert_results_equal(one, other)
    weight = torch.randn(one[0].shape)
    for results in (one, other):
        loss = results[1] + ((results[0] * weight).sum() if results[0].requires_grad else 0)
        loss.backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    assert_gradients_equal(ours, theirs, atol=1e-5)
    assert_state_equal(ours, theirs)


def test_the_gradient_of_cross_entropy_is_at_the_codes_that_gave_the_loss():
    """The peer's codebook is overwritten before its backward pass, which then differentiates at other codes."""
    ours, theirs = pair({})
    x, y = batch((2, 60, 8), 0, {})
    codes, given = ours.codebook.double().clone(), torch.randint(0, 20, (2, 60))
    loss, other_loss = ours(x, indices=given)[1], theirs(y, indices=given)[1]
    torch.testing.assert_close(loss, other_loss)
    loss.backward()
    wide = x.detach().double().requires_grad_()
    F.cross_entropy(-(wide.unsqueeze(2) - codes).norm(dim=-1).flatten(0, 1), given.flatten()).backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)
    assert_state_equal(ours, theirs)


def test_the_parts_of_the_loss():
    ours, theirs = pair({"orthogonal_reg_weight": 2.0, "commitment_weight": 0.5})
    x, y = batch((2, 60, 8), 0, {})
    *_, loss, parts = ours(x, return_loss_breakdown=True)
    *_, other_loss, other_parts = theirs(y, return_loss_breakdown=True)
    assert parts._fields == other_parts._fields
    torch.testing.assert_close(tuple(parts), tuple(other_parts))
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(loss, 0.5 * parts.commitment + 2 * parts.orthogonal_reg)


def test_accumulated_and_outside_updates():
    ours, theirs = pair({})
    for layer in (ours, theirs):
        layer(batch((2, 60, 8), 0, {})[0], accum_ema_update=True)
        layer(batch((2, 60, 8), 1, {})[0])
        layer.update_indices(batch((2, 60, 8), 2, {})[0].detach(), torch.arange(120).view(2, 60) % 20)
    assert_state_equal(ours, theirs)
    ours, theirs = pair({"manual_ema_update": True, "heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True})
    for layer in (ours, theirs):
        layer(batch((2, 60, 8), 0, {})[0])
        layer.update_ema_indices(batch((2, 60, 8), 2, {})[0].detach(), torch.arange(240).view(2, 60, 2) % 20)
        layer._codebook.update_ema()
    assert_state_equal(ours, theirs)


def test_sampling_draws_the_same_codes_from_the_same_generator():
    ours, theirs = pair({"stochastic_sample_codes": True, "sample_codebook_temp": 0.5})
    x, y = batch((2, 60, 8), 0, {})
    torch.manual_seed(5)
    one = ours(x, sample_codebook_temp=0.7)
    torch.manual_seed(5)
    other = theirs(y, sample_codebook_temp=0.7)
    assert_results_equal(one, other)
    assert_state_equal(ours, theirs)
    assert not one[1].equal(pair({})[0](x)[1])
    assert_results_equal(ours(x, sample_codebook_temp=0.0), theirs(y, sample_codebook_temp=0.0))
    ours, theirs = (layer.eval() for layer in pair({"stochastic_sample_codes": True}))
    assert_results_equal(ours(x), theirs(y))


def test_dead_codes_are_reset_as_the_peer_resets_them():
    """Rows are drawn at random by both: which codes, their weights and where they come from are compared."""
    ours, theirs = pair({"threshold_ema_dead_code": 2, "decay": 0.45})
    x = torch.randn(2, 60, 8)
    before = ours.codebook.clone()
    for layer in (ours, theirs):
        layer(x)
    one, other = ours._codebook, theirs._codebook
    torch.testing.assert_close(one.cluster_size, other.cluster_size)
    reset = one.cluster_size[0] == 2
    assert 0 < reset.sum() < 20
    torch.testing.assert_close(one.embed[0, ~reset], other.embed[0, ~reset])
    for book in (one, other):
        distance = (book.embed[0, reset].unsqueeze(1) - x.flatten(0, 1)).abs().amax(-1)
        assert distance.min(1).values.eq(0).all() and distance.argmin(1).unique().numel() == reset.sum()
        torch.testing.assert_close(book.embed_avg[0, reset], 2 * book.embed[0, reset])
    assert not before[reset].eq(one.embed[0, reset]).any()


def test_the_signature_is_the_peers():
    for ours, theirs in ((VectorQuantize, peer.VectorQuantize), (VectorQuantize.forward, peer.VectorQuantize.forward)):
        one, other = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
        assert list(one) == list(other)
        assert [p.default for p in one.values()] == [p.default for p in other.values()]
