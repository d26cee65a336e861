"""What users do to layers between the passes of a checkpoint, and to `set_codebook` and `from_codebook`."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vqkernels.nn import ResidualVectorQuantizer, SimVQ, VectorQuantizer

LAYERS = {
    "EMA": lambda: VectorQuantizer(2, 4, ema_decay=0.5),
    "sampled": lambda: VectorQuantizer(
        2, 4, ema_decay=0.5, temperature=1.0, entropy_weight=0.1, entropy_temperature=1.0
    ),
    "revived": lambda: VectorQuantizer(2, 4, revive="rows", revive_threshold=0.5),
    "residual": lambda: ResidualVectorQuantizer(2, 4, 2, ema_decay=0.5, dropout=0.5, init="kmeans"),
}
REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


def direct(layer, z):
    return layer(z)


def recomputed(reentrant):
    return lambda layer, z: checkpoint(layer, z, use_reentrant=reentrant)


def check(layer, attack, reentrant):
    """`attack(layer, call, rows)` gives a loss; gradient and state are those of the call without a checkpoint."""
    found = []
    for call in (direct, recomputed(reentrant)):
        tried = copy.deepcopy(layer)
        rows = torch.randn(70, 12, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = attack(tried, call, rows)
        if loss is not None:
            loss.backward()
        found.append({"rows": rows.grad} | {name: x.clone() for name, x in tried.state_dict().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def loss_of(result, weight=1.0):
    return weight * result[0].square().sum() + result[2].sum()


@REENTRANT
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_rows_twice_in_one_checkpoint_are_computed_again_in_their_order(name, reentrant):
    def attack(layer, call, rows):
        def twice(z):
            first, second = layer(z), layer(z)
            return first[0] + 2 * second[0], None, first[2] + 3 * second[2]

        return loss_of(call(twice, rows[0]))

    check(LAYERS[name](), attack, reentrant)


@REENTRANT
@pytest.mark.parametrize("name", LAYERS)
def test_checkpoints_of_the_same_rows_may_go_backward_oldest_first(name, reentrant):
    def attack(layer, call, rows):
        first, second = call(layer, rows[0]), call(layer, rows[0])
        loss_of(first).backward()
        return loss_of(second, 2.0)

    check(LAYERS[name](), attack, reentrant)


@REENTRANT
def test_any_number_of_checkpoints_may_wait_for_the_backward_pass(reentrant):
    check(LAYERS["EMA"](), lambda layer, call, rows: sum(loss_of(call(layer, z)) for z in rows), reentrant)


@REENTRANT
def test_a_second_backward_pass_after_another_forward_sees_the_first_codes(reentrant):
    def attack(layer, call, rows):
        loss = loss_of(call(layer, rows[0]))
        loss.backward(retain_graph=True)
        other = loss_of(call(layer, rows[1]))
        return loss + other

    check(LAYERS["EMA"](), attack, reentrant)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_nested_checkpoints_of_every_kind_learn_once(name, inner, outer):
    def attack(layer, call, rows):
        again = call if call is direct else recomputed(inner)

        def region(z):
            first = again(layer, z.sin())
            second = again(layer, first[0].cos())
            return first[0] * second[0], None, first[2] + second[2]

        return loss_of(call(region, rows[0]))

    check(LAYERS[name](), attack, outer)


def between(attack):
    def whole(layer, call, rows):
        loss = loss_of(call(layer, rows[0]))
        attack(layer)
        return loss

    return whole


@REENTRANT
@pytest.mark.parametrize("name", ["temperature", "entropy_temperature"])
def test_a_temperature_may_be_annealed_before_the_backward_pass(name, reentrant):
    check(LAYERS["sampled"](), between(lambda layer: setattr(layer, name, 0.01)), reentrant)


@REENTRANT
@pytest.mark.parametrize("name", ["EMA", "sampled", "residual"])
def test_codes_may_be_set_or_loaded_before_the_backward_pass(name, reentrant):
    state = LAYERS[name]().state_dict()
    check(LAYERS[name](), between(lambda layer: layer.set_codebook(layer.codebook + 1)), reentrant)
    check(LAYERS[name](), between(lambda layer: layer.load_state_dict(copy.deepcopy(state))), reentrant)


@REENTRANT
@pytest.mark.parametrize("make", [*LAYERS.values(), lambda: SimVQ(2, 4)])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_that_is_switched_on_before_the_backward_pass_learns_nothing_of_it(make, frozen, reentrant):
    layer = make()
    layer.freeze() if frozen else layer.eval()
    result = recomputed(reentrant)(layer, torch.randn(12, 2, requires_grad=True))
    before = copy.deepcopy(layer.state_dict())
    layer.freeze(False).train()
    loss_of(result).backward()
    assert all(x.equal(before[name]) for name, x in layer.state_dict().items() if not name.endswith("_steps"))


def test_a_layer_takes_its_own_codes_and_keeps_its_seed():
    layer = VectorQuantizer(2, 4, ema_decay=0.5, revive="rows")
    codes, seed = layer.codebook.clone(), layer.seed.clone()
    layer.set_codebook(layer.codebook)
    assert layer.codebook.equal(codes) and layer.ema_sums.equal(codes) and layer.seed.equal(seed)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "2"])
def test_the_weight_of_given_codes_is_a_number_of_at_least_0(weight):
    with pytest.raises(ValueError, match="weight must be a finite number, at least 0"):
        VectorQuantizer.from_codebook(torch.randn(4, 2), weight=weight)


def test_options_that_contradict_the_given_codes_are_errors():
    with pytest.raises(ValueError, match="heads must be 2 for codes of shape .* got 3"):
        VectorQuantizer.from_codebook(torch.randn(2, 4, 2), heads=3)
    with pytest.raises(ValueError, match="levels must be 3 for codes of shape .* got 2"):
        ResidualVectorQuantizer.from_codebook(torch.randn(3, 4, 2), levels=2)
    for layer in (VectorQuantizer, ResidualVectorQuantizer):
        with pytest.raises(TypeError, match="codes must be a tensor, got list"):
            layer.from_codebook([[1.0, 2.0]])
