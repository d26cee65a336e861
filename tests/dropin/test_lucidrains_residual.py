"""Parity of `ResidualVQ`, `GroupedResidualVQ` and `SimVQ` with the real vector-quantize-pytorch."""

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

from vqkernels.dropin import lucidrains

peer = pytest.importorskip("vector_quantize_pytorch")

MASK = torch.arange(120).view(2, 60) % 3 > 0
RESIDUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "straight-through": ({"rotation_trick": False}, {}),
    "codebook_dim": ({"codebook_dim": 4}, {}),
    "cosine": ({"use_cosine_sim": True}, {}),
    "shared": ({"shared_codebook": True}, {}),
    "sizes": ({"codebook_size": (20, 10, 5), "num_quantizers": None}, {}),
    "mask": ({}, {"mask": MASK}),
    "mask codebook_dim": ({"codebook_dim": 4}, {"mask": MASK}),
    "mask keeps the input": ({"return_zeros_for_masked_padding": False}, {"mask": MASK}),
    "frozen": ({}, {"freeze_codebook": True}),
    "learnable": ({"learnable_codebook": True, "ema_update": False}, {}),
    "gradient between levels": ({"learnable_codebook": True, "ema_update": False, "quant_grad_frac": 0.4}, {}),
    "dropout": ({"quantize_dropout": True}, {"rand_quantize_dropout_fixed_seed": 3}),
    "structured dropout": (
        {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": 2},
        {"rand_quantize_dropout_fixed_seed": 11},
    ),
    "diveq": ({"diveq": True}, {}),
}
GROUPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "codebook_dim": ({"codebook_dim": 3}, {}),
    "mask": ({}, {"mask": MASK}),
    "dropout": ({"quantize_dropout": True}, {}),
}
SIMVQ: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "defaults": ({}, (2, 60, 8)),
    "straight-through": ({"rotation_trick": False}, (2, 60, 8)),
    "image": ({"channel_first": True}, (2, 8, 5, 7)),
    "weights": ({"input_to_quantize_commit_loss_weight": 0.6, "commitment_weight": 3.0}, (2, 60, 8)),
    "basis": ({"frozen_codebook_dim": 5, "init_fn": torch.sin}, (2, 60, 8)),
}


def pair(name: str, **arguments: Any) -> tuple[Any, Any]:
    layers = []
    for library in (lucidrains, peer):
        torch.manual_seed(1)
        layers.append(getattr(library, name)(**arguments))
    return layers[0], layers[1]


def residual(arguments: dict[str, Any]) -> tuple[Any, Any]:
    return pair("ResidualVQ", **{"dim": 8, "num_quantizers": 3, "codebook_size": 20} | arguments)


def grouped(arguments: dict[str, Any]) -> tuple[Any, Any]:
    return pair("GroupedResidualVQ", **{"dim": 8, "groups": 2, "num_quantizers": 3, "codebook_size": 20} | arguments)


def step(ours: Any, theirs: Any, call: dict[str, Any], seed: int = 0, shape: tuple[int, ...] = (2, 60, 8)) -> None:
    """One forward and backward of both, with the same random numbers; everything is compared."""
    x, y = batch(shape, seed, {})
    torch.manual_seed(2)
    one = ours(x, **call)
    torch.manual_seed(2)
    other = theirs(y, **call)
    assert_results_equal(one, other)
    if one[0].requires_grad:
        objective(one).backward()
        objective(other).backward()
        if y.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
        assert_gradients_equal(ours, theirs, atol=1e-5)
    assert_state_equal(ours, theirs)


@pytest.mark.parametrize("case", RESIDUAL)
@pytest.mark.parametrize("training", [True, False])
def test_residual(case, training):
    arguments, call = RESIDUAL[case]
    ours, theirs = (layer.train(training) for layer in residual(arguments))
    assert_state_equal(ours, theirs, 0, 0)
    step(ours, theirs, call)


@pytest.mark.parametrize("case", ["defaults", "codebook_dim", "shared", "mask", "learnable"])
def test_residual_for_twenty_steps(case):
    arguments, call = RESIDUAL[case]
    runs = []
    for layer in residual(arguments):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1)), *layer.parameters()], lr=0.1)
        losses = []
        for number in range(20):
            loss = objective(layer(batch((2, 60, 8), number, {})[0], **call))
            optimizer.zero_grad()
            (loss / 120).backward()
            optimizer.step()
            losses.append(loss.detach())
        runs.append((layer, torch.stack(losses)))
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-3, atol=1e-3)
    assert_state_equal(runs[0][0], runs[1][0], 1e-3, 1e-4)


@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize("training", [True, False])
def test_grouped(case, training):
    arguments, call = GROUPED[case]
    ours, theirs = (layer.train(training) for layer in grouped(arguments))
    assert_state_equal(ours, theirs, 0, 0)
    step(ours, theirs, call)
    x, both = torch.randn(2, 60, 8), []
    for layer in (ours, theirs):
        torch.manual_seed(5)
        *results, codes = layer(x, **call, return_all_codes=True)
        assert isinstance(codes, tuple) and len(codes) == 2
        both.append((*results, *codes))
    assert_results_equal(*both)


@pytest.mark.parametrize("case", ["defaults", "codebook_dim", "sizes", "shared"])
def test_codes_of_residual_indices(case):
    ours, theirs = (layer.eval() for layer in residual(RESIDUAL[case][0]))
    x = torch.randn(2, 60, 8)
    quantized, indices, _, codes = ours(x, return_all_codes=True)
    assert_results_equal((quantized, indices, codes), [theirs(x, return_all_codes=True)[i] for i in (0, 1, 3)])
    assert_results_equal((ours.get_output_from_indices(indices),), (theirs.get_output_from_indices(indices),))
    torch.testing.assert_close(ours.get_output_from_indices(indices), quantized)
    torch.testing.assert_close(ours.codebooks, theirs.codebooks)


def test_coarse_indices_and_dropped_levels_decode():
    ours, theirs = (layer.eval() for layer in residual({"quantize_dropout": True}))
    indices = torch.randint(0, 20, (2, 60, 2))
    torch.testing.assert_close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    indices = torch.cat([indices, torch.full((2, 60, 1), -1)], -1)
    torch.testing.assert_close(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices))


def test_codes_of_grouped_indices():
    ours, theirs = (layer.eval() for layer in grouped({"codebook_dim": 3}))
    indices = ours(torch.randn(2, 60, 8))[1]
    assert_results_equal((ours.get_codes_from_indices(indices),), (theirs.get_codes_from_indices(indices),))
    assert_results_equal((ours.get_output_from_indices(indices),), (theirs.get_output_from_indices(indices),))
    torch.testing.assert_close(ours.codebooks, theirs.codebooks)
    assert ours.split_dim == theirs.split_dim


@pytest.mark.parametrize("case", SIMVQ)
@pytest.mark.parametrize("training", [True, False])
def test_simvq(case, training):
    arguments, shape = SIMVQ[case]
    ours, theirs = (layer.train(training) for layer in pair("SimVQ", dim=8, codebook_size=20, **arguments))
    assert_state_equal(ours, theirs, 0, 0)
    step(ours, theirs, {}, shape=shape)
    x = batch(shape, 0, {})[0]
    quantized, indices, loss = ours(x)
    assert loss > 0 and loss.requires_grad
    torch.testing.assert_close(ours.indices_to_codes(indices), theirs.indices_to_codes(indices))
    torch.testing.assert_close(ours.indices_to_codes(indices), quantized, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.codebook, theirs.codebook)


def test_simvq_with_a_transform_of_ones_own():
    transform = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 8))
    ours, theirs = pair("SimVQ", dim=8, codebook_size=20, codebook_transform=transform)
    assert_state_equal(ours, theirs, 0, 0)
    x, y = batch((2, 60, 8), 0, {})
    assert_results_equal(ours(x), theirs(y))


@pytest.mark.parametrize("case", ["defaults", "codebook_dim", "shared"])
def test_a_residual_checkpoint_of_either_loads_in_the_other(case):
    ours, theirs = residual(RESIDUAL[case][0])
    for layer in (ours, theirs):
        layer(torch.randn(2, 60, 8))
    fresh, other_fresh = residual(RESIDUAL[case][0])
    fresh.load_state_dict(theirs.state_dict())
    other_fresh.load_state_dict(ours.state_dict())
    step(fresh, theirs, {}, 1)
    step(ours, other_fresh, {}, 2)


@pytest.mark.parametrize("name", ["ResidualVQ", "GroupedResidualVQ", "SimVQ"])
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_the_signature_is_the_peers(name, method):
    one, other = (inspect.signature(getattr(getattr(x, name), method)).parameters for x in (lucidrains, peer))
    assert [(p.name, p.kind) for p in one.values()] == [(p.name, p.kind) for p in other.values()]
    ours, theirs = ({n: p.default for n, p in x.items() if n not in ("mlp_kwargs", "init_fn")} for x in (one, other))
    assert ours == theirs
