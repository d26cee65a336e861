"""A live layer of lucidrains taken over and given back: the same tensors, the same training, what was learned kept."""

from typing import Any

import pytest
import torch
from dropin.lucidrains_parity import assert_gradients_equal, assert_results_equal, assert_state_equal, batch, objective

from vqkernels.dropin.lucidrains import ADAPTERS, RELEASERS

peer = pytest.importorskip("vector_quantize_pytorch")

SIZES = {"dim": 8, "codebook_size": 20}
LAYERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "defaults": ("VectorQuantize", SIZES, (2, 60, 8)),
    "projected cosine": ("VectorQuantize", SIZES | {"codebook_dim": 4, "use_cosine_sim": True}, (2, 60, 8)),
    "layernorm": ("VectorQuantize", SIZES | {"codebook_dim": 4, "layernorm_after_project_in": True}, (2, 60, 8)),
    "separate heads": (
        "VectorQuantize",
        SIZES | {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True, "accept_image_fmap": True},
        (2, 8, 5, 7),
    ),
    "settings": (
        "VectorQuantize",
        SIZES | {"commitment_weight": 0.3, "decay": 0.9, "eps": 1e-3, "rotation_trick": False, "channel_last": False},
        (2, 8, 60),
    ),
    "learnable": ("VectorQuantize", SIZES | {"learnable_codebook": True, "ema_update": False}, (2, 60, 8)),
    "orthogonal": ("VectorQuantize", SIZES | {"orthogonal_reg_weight": 2.0}, (2, 60, 8)),
    "residual": ("ResidualVQ", SIZES | {"num_quantizers": 3}, (2, 60, 8)),
    "residual projected": ("ResidualVQ", SIZES | {"num_quantizers": 3, "codebook_dim": 4}, (2, 60, 8)),
    "residual shared": ("ResidualVQ", SIZES | {"num_quantizers": 3, "shared_codebook": True}, (2, 60, 8)),
    "residual sizes": ("ResidualVQ", {"dim": 8, "codebook_size": (20, 10)}, (2, 60, 8)),
    "grouped": ("GroupedResidualVQ", SIZES | {"groups": 2, "num_quantizers": 2}, (2, 60, 8)),
    "simvq": ("SimVQ", SIZES | {"channel_first": True}, (2, 8, 5, 7)),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "straight_through": ("VectorQuantize", {"straight_through": True, "rotation_trick": False}),
    "codebook_diversity_loss_weight": ("VectorQuantize", {"codebook_diversity_loss_weight": 0.1}),
    "affine_param": ("VectorQuantize", {"affine_param": True}),
    "in_place_codebook_optimizer": (
        "VectorQuantize",
        {
            "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, 0.1),
            "learnable_codebook": True,
            "ema_update": False,
        },
    ),
    "vq_bridge": ("VectorQuantize", {"vq_bridge": torch.nn.Identity()}),
    "implicit_neural_codebook": ("ResidualVQ", {"num_quantizers": 2, "implicit_neural_codebook": True}),
    "beam_size": ("ResidualVQ", {"num_quantizers": 2, "beam_size": 2}),
}


def key(layer: torch.nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def build(case: str) -> tuple[Any, Any, tuple[int, ...]]:
    """Two equal layers of the peer."""
    name, arguments, shape = LAYERS[case]
    layers = []
    for _ in range(2):
        torch.manual_seed(1)
        layers.append(getattr(peer, name)(**arguments))
    return layers[0], layers[1], shape


def train(layer: torch.nn.Module, shape: tuple[int, ...], steps: range, optimizer: torch.optim.Optimizer) -> None:
    for number in steps:
        optimizer.zero_grad()
        (objective(layer(batch(shape, number, {})[0])) / 120).backward()
        optimizer.step()


def tensors(layer: torch.nn.Module) -> dict[str, Any]:
    """Parameters and lasting buffers by name, as objects."""
    return dict(layer.state_dict(keep_vars=True))


@pytest.mark.parametrize("case", LAYERS)
def test_the_adopted_layer_computes_the_same_over_the_same_tensors(case):
    theirs, twin, shape = build(case)
    before, state = tensors(theirs), torch.get_rng_state()
    ours = ADAPTERS[key(theirs)](theirs)
    assert state.equal(torch.get_rng_state())  # nothing was drawn
    after = tensors(ours)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert ours.training
    x, y = batch(shape, 0, {})
    one, other = ours(x), twin(y)
    assert_results_equal(one, other)
    objective(one).backward()
    objective(other).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    assert_gradients_equal(ours, twin, atol=1e-5)
    assert_state_equal(ours, twin)


@pytest.mark.parametrize("case", LAYERS)
def test_back_after_twenty_steps_with_what_was_learned(case):
    """The optimizer was made before the swap, and goes on after it and after the way back."""
    theirs, twin, shape = build(case)
    optimizer, other = (
        torch.optim.Adam([torch.nn.Parameter(torch.zeros(1)), *layer.parameters()], lr=1e-3) for layer in (theirs, twin)
    )
    ours = ADAPTERS[key(theirs)](theirs)
    train(ours, shape, range(20), optimizer)
    ours.eval()
    RELEASERS[key(theirs)](ours, theirs)
    assert not theirs.training
    train(theirs.train(), shape, range(20, 22), optimizer)
    train(twin, shape, range(22), other)
    assert_state_equal(theirs, twin, 1e-3, 1e-4)


def test_buffers_that_moved_go_back():
    theirs, _, _ = build("residual shared")
    ours = ADAPTERS[key(theirs)](theirs)
    ours.double()
    ours(torch.randn(2, 60, 8, dtype=torch.float64))
    ours.layers[1].freeze_codebook = True
    RELEASERS[key(theirs)](ours, theirs)
    assert all(x.dtype == torch.float64 for x in theirs.state_dict().values() if x.is_floating_point())
    assert_state_equal(ours, theirs, 0, 0)
    assert theirs.layers[1].freeze_codebook and not theirs.layers[0].freeze_codebook
    assert theirs.layers[0]._codebook is theirs.layers[2]._codebook


def test_a_kmeans_layer_starts_after_the_swap():
    theirs = peer.VectorQuantize(**SIZES, kmeans_init=True)
    ours = ADAPTERS[key(theirs)](theirs)
    ours(torch.randn(2, 60, 8))
    assert theirs._codebook.initted and theirs.codebook.any(1).all()


@pytest.mark.parametrize("case", REFUSED)
def test_an_option_without_a_counterpart_is_named(case):
    name, arguments = REFUSED[case]
    theirs = getattr(peer, name)(**SIZES, **arguments)
    with pytest.raises(ValueError, match=case):
        ADAPTERS[key(theirs)](theirs)


def test_a_sampling_function_of_ones_own_is_named():
    theirs = peer.VectorQuantize(**SIZES)
    theirs._codebook.gumbel_sample = lambda logits, **_: logits
    with pytest.raises(ValueError, match="gumbel_sample"):
        ADAPTERS[key(theirs)](theirs)


def test_a_layer_of_another_version_is_left_alone():
    theirs = peer.VectorQuantize(**SIZES)
    del theirs.route_gradients_to_input
    with pytest.raises(ValueError, match="not known here: .*route_gradients_to_input"):
        ADAPTERS[key(theirs)](theirs)


def test_a_narrowed_layer_learns_in_float32_and_gives_that_back():
    theirs = peer.VectorQuantize(**SIZES, codebook_dim=4).bfloat16()
    ours = ADAPTERS[key(theirs)](theirs)
    quantized, _, loss = ours(torch.randn(2, 60, 8).bfloat16())
    assert quantized.dtype == torch.bfloat16 and loss.isfinite()
    assert {ours._codebook.embed.dtype, ours._codebook.embed_avg.dtype} == {torch.float32}
    RELEASERS[key(theirs)](ours, theirs)
    assert theirs._codebook.embed is ours._codebook.embed
    assert theirs(torch.randn(2, 60, 8).bfloat16())[0].isfinite().all()


def test_every_class_has_a_way_there_and_back():
    names = {key(build(case)[0]) for case in LAYERS}
    assert set(ADAPTERS) == set(RELEASERS) == names
