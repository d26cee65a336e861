"""State lives in tensors: whatever fills them, and whatever dtype, generator or checkpoint they come from."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vqkernels.nn import GroupedResidualVectorQuantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer

INITIALISED = {
    "plain": lambda **options: VectorQuantizer(4, 8, init="kmeans", **options),
    "EMA": lambda **options: VectorQuantizer(4, 8, init="kmeans", ema_decay=0.9, **options),
    "residual": lambda **options: ResidualVectorQuantizer(4, 8, 2, init="kmeans", ema_decay=0.9, **options),
}


def copy_into(layer, state):
    for name, x in layer.state_dict().items():
        x.copy_(state[name])


def copy_into_data(layer, state):
    for name, x in (*layer.named_parameters(), *layer.named_buffers()):
        x.data.copy_(state[name])


def replace_buffers(layer, state):
    for name in dict(layer.named_buffers()):
        layer._buffers[name] = state[name].clone()
    for name, parameter in layer.named_parameters():
        parameter.data = state[name].clone()


FILLS = {
    "copy_": copy_into,
    "data.copy_": copy_into_data,
    "replaced": replace_buffers,
    "load_state_dict": lambda layer, state: layer.load_state_dict(state),
    "assign": lambda layer, state: layer.load_state_dict(copy.deepcopy(state), assign=True),
}


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("name", INITIALISED)
def test_codes_that_were_filled_in_are_not_computed_again(name, fill):
    torch.manual_seed(1)
    trained = INITIALISED[name]()
    trained(torch.randn(60, 4))
    state = copy.deepcopy(trained.state_dict())
    z = torch.randn(60, 4)
    trained(z)
    layer = INITIALISED[name]()
    with torch.no_grad():
        FILLS[fill](layer, state)
    layer(z)
    for key, value in trained.state_dict().items():
        assert layer.state_dict()[key].equal(value), key


@pytest.mark.parametrize("fill", ["replaced", "load_state_dict", "assign"])
def test_codes_of_a_layer_that_had_not_begun_are_computed_again(fill):
    layer = INITIALISED["EMA"]()
    fresh = copy.deepcopy(layer.state_dict())
    layer(torch.randn(60, 4))
    FILLS[fill](layer, fresh)
    layer(10 + torch.randn(60, 4))
    assert layer.initialised == 1 and layer.codebook.min() > 5


def test_a_functional_call_asks_the_buffers_that_it_is_given():
    layer, trained = INITIALISED["EMA"](), INITIALISED["EMA"]()
    trained(torch.randn(60, 4))
    state = {name: x.clone() for name, x in trained.state_dict().items()}
    z = torch.randn(60, 4)
    expected = trained(z)[0]
    assert torch.func.functional_call(layer, state, z)[0].equal(expected) and layer.initialised == 0


def test_to_empty_forgets_that_codes_were_computed():
    layer = INITIALISED["EMA"]()
    layer(torch.randn(60, 4))
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    layer(10 + torch.randn(60, 4))
    assert layer.codebook.min() > 5


@pytest.mark.parametrize("revive", ["off", "rows"])
def test_waiting_statistics_are_no_buffers_and_begin_at_zero(revive):
    """`from_pretrained` builds on the meta device and fills what a checkpoint holds; the rest is any memory."""
    options = dict(ema_decay=0.9, ema_update="manual", revive=revive)
    source = VectorQuantizer(4, 8, **options)
    with torch.device("meta"):
        layer = VectorQuantizer(4, 8, **options)
    assert set(dict(layer.named_buffers())) == set(layer.state_dict())
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    before = layer.codebook.clone()
    layer.update_codebook(), source.update_codebook()
    assert layer.codebook.equal(before) and layer.ema_counts.eq(0).all()
    z = torch.randn(40, 4)
    for x in (layer, source):
        x(z), x.update_codebook()
    assert layer.codebook.equal(source.codebook)


def test_waiting_statistics_follow_a_copy_and_a_move():
    layer = VectorQuantizer(4, 8, ema_decay=0.9, ema_update="manual")
    z = torch.randn(40, 4)
    layer(z[:20])
    twin = copy.deepcopy(layer).bfloat16().float()
    for x in (layer, twin):
        x(z[20:]), x.update_codebook()
        assert x.counts.sum() == 40
    assert twin.codebook.equal(layer.codebook)


@pytest.fixture
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "build",
    [
        lambda: VectorQuantizer(4, 8, ema_decay=0.999, revive="rows"),
        lambda: VectorQuantizer(4, 8, ema_decay=0.999, ema_update="manual", revive="rows"),
        lambda: ResidualVectorQuantizer(4, 8, 2, ema_decay=0.999),
        lambda: SimVQ(4, 8),
    ],
)
def test_statistics_are_float32_under_a_default_of_bfloat16(build, bfloat16_by_default):
    layer = build()
    layer(torch.randn(20, 4, dtype=torch.float32 if isinstance(layer, SimVQ) else torch.bfloat16))
    floating = {name: x.dtype for name, x in layer.named_buffers() if x.is_floating_point()}
    assert set(floating.values()) == {torch.float32}, floating
    if getattr(layer, "_pending", None) is not None:
        assert layer._pending.sums.dtype == layer._pending.candidates.rows.dtype == torch.float32


@pytest.mark.parametrize("narrowed", ["assign", "buffers"])
def test_averages_do_not_drift_where_something_made_their_buffers_narrow(narrowed):
    """In bfloat16 a mean of decay 0.999 stops short of 1 (0.001 of a row is below half a unit in the last place)."""
    layer = VectorQuantizer.from_codebook(torch.zeros(2, 3), ema_decay=0.999)
    narrow = {name: x.bfloat16() if x.is_floating_point() else x for name, x in layer.state_dict().items()}
    if narrowed == "assign":
        layer.load_state_dict(narrow, assign=True)
    else:
        replace_buffers(layer, narrow)
    row = torch.tensor([[0.5, 0.0, 0.0]])
    for _ in range(3000):
        layer(row)
    expected = 0.5 * (1 - 0.999**3000)
    assert layer.ema_sums.dtype == torch.float32 and layer.codebook[0, 0].item() == pytest.approx(expected, rel=1e-3)


def test_loaded_codes_weigh_as_much_as_one_row():
    saved = VectorQuantizer(1, 2)
    saved.codebook.data.copy_(torch.tensor([[0.0], [100.0]]))
    layer = VectorQuantizer(1, 2, ema_decay=0.99)
    layer.load_state_dict(saved.state_dict(), strict=False)
    layer(torch.tensor([[4.0]]))
    assert layer.codebook.flatten().tolist() == pytest.approx([0.04, 100.0])


@pytest.mark.parametrize("weight,expected", [(1.0, 0.04), (0.0, 4.0), (3.0, 0.04 / 2.98)])
def test_given_codes_have_a_weight(weight, expected):
    layer = VectorQuantizer.from_codebook(torch.tensor([[0.0], [100.0]]), weight=weight, ema_decay=0.99, init="kmeans")
    layer(torch.tensor([[4.0]]))
    assert layer.codebook.flatten().tolist() == pytest.approx([expected, 100.0])
    assert layer.initialised == 1


@pytest.mark.parametrize(
    "build,codes,options",
    [
        (VectorQuantizer, torch.randn(8, 3), dict()),
        (VectorQuantizer, torch.randn(8, 3), dict(heads=2, ema_decay=0.9)),
        (VectorQuantizer, torch.randn(2, 8, 3), dict(metric="cosine", ema_decay=0.9)),
        (VectorQuantizer, torch.randn(8, 3), dict(dim=5, revive="rows")),
        (ResidualVectorQuantizer, torch.randn(2, 8, 3), dict(ema_decay=0.9)),
        (ResidualVectorQuantizer, torch.randn(2, 2, 8, 3), dict()),
        (ResidualVectorQuantizer, torch.randn(8, 3), dict(shared_codebook=True, levels=4)),
        (GroupedResidualVectorQuantizer, torch.randn(2, 3, 8, 3), dict(ema_decay=0.9)),
    ],
)
def test_layers_start_from_given_codes(build, codes, options):
    layer = build.from_codebook(codes, **options)
    assert layer.codebook.equal(codes) and layer.codebook_size == 8 and layer.codebook_dim == 3
    z = torch.randn(20, layer.dim)
    assert layer(z)[0].shape == z.shape
    with pytest.raises(ValueError, match=r"codes must have the shape of the codebook, \[.*8.*\] \(.*\), got \[5\]"):
        layer.set_codebook(torch.zeros(5))


TRAINED = {
    "sampled": (dict(temperature=1.0), dict()),
    "k-means": (dict(init="kmeans"), dict()),
    "revived": (dict(revive="rows"), dict()),
    "EMA, revived, sampled": (dict(ema_decay=0.9, revive="rows", temperature=1.0), dict(ema_decay=0.9)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_layer_for_decoding_loads_what_training_saved(name):
    options, others = TRAINED[name]
    trained, layer = VectorQuantizer(4, 8, **options), VectorQuantizer(4, 8, **others)
    trained(torch.randn(60, 4))
    assert not any(layer.load_state_dict(trained.state_dict()))
    z = torch.randn(20, 4)
    assert layer.eval()(z)[0].equal(trained.eval()(z)[0])


def test_a_residual_layer_for_decoding_loads_what_training_with_dropout_saved():
    trained, layer = ResidualVectorQuantizer(4, 8, 2, dropout=0.5), ResidualVectorQuantizer(4, 8, 2)
    trained(torch.randn(60, 4))
    assert not any(layer.load_state_dict(trained.state_dict()))
    assert not any(trained.load_state_dict(layer.state_dict()))  # and the counters of draws go on where they are


def test_usage_that_a_checkpoint_does_not_hold_is_explained_and_begins_at_one_row():
    saved, layer = VectorQuantizer(4, 8), VectorQuantizer(4, 8, revive="rows")
    with pytest.raises(
        RuntimeError, match='ema_counts: this layer has revive="rows", but the checkpoint holds no usage'
    ):
        layer.load_state_dict(saved.state_dict())
    layer.load_state_dict(saved.state_dict(), strict=False)
    assert layer.ema_counts.eq(1).all()


def draws(layer, z):
    return (layer(z)[1] if isinstance(layer, VectorQuantizer) else layer(z)[1] >= 0).clone()


DRAWING = {
    "codes": lambda **options: VectorQuantizer(4, 64, temperature=50.0, **options),
    "levels": lambda **options: ResidualVectorQuantizer(4, 8, 8, dropout=1.0, **options),
}


@pytest.mark.parametrize("name", DRAWING)
def test_layers_draw_apart_and_repeat_under_manual_seed(name):
    z = torch.randn(2000, 4)
    torch.manual_seed(3)
    first, second = DRAWING[name](), DRAWING[name]()
    torch.manual_seed(3)
    again = DRAWING[name]()
    second.codebook.data.copy_(first.codebook)
    expected = draws(first, z)
    assert draws(again, z).equal(expected)
    same = (draws(second, z) == expected).float().mean()
    independent = {"codes": 1 / 64, "levels": 0.67}[name]
    assert float(same) == pytest.approx(independent, abs=0.05)
    given = [DRAWING[name](seed=9) for _ in range(2)]
    given[1].load_state_dict(given[0].state_dict())
    assert draws(given[0], z).equal(draws(given[1], z)) and given[0].seed == 9


def test_layers_revive_and_begin_from_other_rows():
    z = torch.randn(4000, 4)
    one, other = (VectorQuantizer(4, 512, ema_decay=0.9, revive="rows", init="kmeans") for _ in range(2))
    one(z), other(z)
    assert not one.codebook.equal(other.codebook)
    one, other = (VectorQuantizer(4, 64, ema_decay=0.9, revive="rows") for _ in range(2))
    other.codebook.data.copy_(one.codebook)
    one(z), other(z)
    revived = [{tuple(row) for row in x.codebook.tolist()} & {tuple(row) for row in z.tolist()} for x in (one, other)]
    assert min(map(len, revived)) > 10 and len(revived[0] & revived[1]) < len(revived[0]) / 2


def test_draws_go_on_after_a_resume():
    z = torch.randn(500, 4)
    straight = DRAWING["codes"]()
    draws(straight, z)
    resumed = DRAWING["codes"]()
    resumed.load_state_dict(straight.state_dict())
    assert draws(resumed, z).equal(draws(straight, z))


@pytest.mark.parametrize("name", ["temperature", "entropy_temperature"])
def test_one_graph_serves_every_temperature(name):
    torch._dynamo.reset()
    layer = VectorQuantizer(4, 8, temperature=1.0, entropy_weight=0.1, seed=1)
    twin = copy.deepcopy(layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    z = torch.randn(40, 4)
    compiled(z), layer(z)
    graphs = counter.frame_count
    for step in range(20):
        for x in (layer, twin):
            setattr(x, name, 0.5 + step / 10)
        for ours, plain in zip(compiled(z), layer(z), strict=True):
            torch.testing.assert_close(ours, plain)
    assert counter.frame_count == graphs and getattr(layer, name) == 2.4
    with pytest.raises(ValueError, match=f"{name} must be"):
        setattr(layer, name, -1.0)


def test_what_is_kept_for_a_recomputation_goes_with_the_layer():
    from torch.utils.checkpoint import checkpoint

    from vqkernels.ops import recomputation

    gc.collect()
    before = len(recomputation._kept)
    layer = VectorQuantizer(4, 8, ema_decay=0.9)
    checkpoint(layer, torch.randn(20, 4, requires_grad=True), use_reentrant=False)
    assert len(recomputation._kept) == before + 1
    del layer
    gc.collect()
    assert len(recomputation._kept) == before


def test_a_caller_may_change_the_indices_before_the_backward_pass():
    for layer in (VectorQuantizer(4, 8), ResidualVectorQuantizer(4, 8, 2), nn.Sequential(SimVQ(4, 8))):
        z = torch.randn(20, 4, requires_grad=True)
        quantized, indices, loss = layer(z)
        expected = torch.autograd.grad(quantized.square().sum() + loss.sum(), z, retain_graph=True)[0]
        indices.fill_(0)
        assert torch.autograd.grad(quantized.square().sum() + loss.sum(), z)[0].equal(expected)


def test_a_temperature_cannot_be_given_to_a_layer_that_was_built_without():
    layer = VectorQuantizer(4, 8)
    with pytest.raises(ValueError, match="temperature was None when the layer was built, got 1.0: build the layer"):
        layer.temperature = 1.0
