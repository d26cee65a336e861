"""What people do to the state of a drop-in: the buffer says whether it is initialised, averages stay float32, indices
that are returned belong to the caller."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from vqkernels.dropin import dac, diffusers, encodec, llamagen, pytorch_vqvae, rosinality, taming
from vqkernels.dropin.lucidrains import ResidualVQ, VectorQuantize

D, K = 4, 6
FROM_DATA = {
    "lucidrains": (lambda: VectorQuantize(D, K, kmeans_init=True), (2, 20, D), "_codebook.initted"),
    "encodec": (lambda: encodec.VectorQuantization(D, K), (2, D, 20), "_codebook.inited"),
}
from_data = pytest.mark.parametrize("name", FROM_DATA)


def begun(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A layer that has begun, a fresh one, and rows."""
    build, shape, _ = FROM_DATA[name]
    trained, x = build(), torch.randn(shape)
    for _ in range(3):
        trained(x)
    return trained.eval(), build().eval(), x


def put_directly(layer: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """As transformers and accelerate put tensors in their place."""
    for key, value in state.items():
        owner, _, name = key.rpartition(".")
        layer.get_submodule(owner)._buffers[name] = value.clone()


def copy_in_place(layer: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """As DistributedDataParallel and torch.distributed.checkpoint fill them."""
    with torch.no_grad():
        for key, value in layer.state_dict(keep_vars=True).items():
            value.copy_(state[key])


LOADERS = {
    "load_state_dict": lambda layer, state: layer.load_state_dict(state),
    "assign": lambda layer, state: layer.load_state_dict(state, assign=True),
    "not strict": lambda layer, state: layer.load_state_dict(state, strict=False),
    "put directly": put_directly,
    "in place": copy_in_place,
}


@pytest.mark.parametrize("load", LOADERS)
@from_data
def test_codes_that_were_filled_in_are_kept(name, load):
    trained, fresh, x = begun(name)
    state = {key: value.clone() for key, value in trained.state_dict().items()}
    LOADERS[load](fresh, state)
    assert fresh(x)[1].equal(trained(x)[1])
    torch.testing.assert_close(fresh.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("load", ["load_state_dict", "assign", "put directly"])
@from_data
def test_a_layer_that_is_emptied_begins_again(name, load):
    trained, fresh, x = begun(name)
    LOADERS[load](trained, {key: value.clone() for key, value in fresh.state_dict().items()})
    trained(x)
    flag = FROM_DATA[name][2]
    assert trained.state_dict()[flag].all() and trained._codebook.embed.any()


@from_data
def test_the_state_of_a_functional_call_decides(name):
    trained, fresh, x = begun(name)
    state = {key: value.clone() for key, value in trained.state_dict().items()}
    assert functional_call(fresh, state, (x,))[1].equal(trained(x)[1])
    assert not fresh.state_dict()[FROM_DATA[name][2]].any()
    fresh(x)
    assert fresh.state_dict()[FROM_DATA[name][2]].all()


@from_data
def test_copies_moves_and_meta_layers_know_what_they_hold(name):
    trained, _, x = begun(name)
    expected, state = trained(x)[1], copy.deepcopy(trained.state_dict())
    with torch.device("meta"):
        empty = FROM_DATA[name][0]().eval()
    empty.load_state_dict(state, assign=True)
    for layer in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained)), copy.deepcopy(trained).double(), empty):
        assert layer(x.to(layer._codebook.embed.dtype))[1].equal(expected)


@from_data
def test_the_device_is_not_asked_once_the_flag_was_seen(name):
    trained, _, x = begun(name)
    trained._codebook._look = lambda: pytest.fail("the flag was read again")
    trained.train()(x)


@from_data
def test_a_graph_knows_that_the_codes_were_loaded(name):
    trained, fresh, x = begun(name)
    fresh.load_state_dict(trained.state_dict())
    fresh.to(torch.float64).to(torch.float32)
    torch._dynamo.reset()
    assert torch.compile(fresh, fullgraph=True, backend="eager")(x)[1].equal(trained(x)[1])
    put_directly(fresh, {key: value.clone() for key, value in trained.state_dict().items()})
    exported = torch.export.export(fresh, (x,), strict=False)
    assert exported.module()(x)[1].equal(trained(x)[1])


@from_data
def test_a_batch_of_nan_rows_begins_nothing(name):
    layer, _, x = (FROM_DATA[name][0](), None, torch.randn(FROM_DATA[name][1]))
    layer(torch.full_like(x, torch.nan))
    assert not layer.state_dict()[FROM_DATA[name][2]].any()
    layer(x)
    assert layer.state_dict()[FROM_DATA[name][2]].all() and layer._codebook.embed.isfinite().all()


def test_a_batch_that_is_all_masked_begins_nothing():
    layer, x = VectorQuantize(D, K, kmeans_init=True), torch.randn(2, 20, D)
    layer(x, mask=torch.zeros(2, 20, dtype=torch.bool))
    assert not layer._codebook.initted
    layer(x, mask=torch.ones(2, 20, dtype=torch.bool))
    assert layer._codebook.initted and layer(x)[1].unique().numel() == K


@from_data
def test_too_few_rows_are_named(name):
    layer, x = FROM_DATA[name][0](), torch.zeros(FROM_DATA[name][1])
    x[0, :, 0] = 1
    with pytest.warns(RuntimeWarning, match="k-means initialisation of 6 codes from [23] different rows"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


STATISTICS = {
    "lucidrains": (lambda: VectorQuantize(D, K), (2, 20, D)),
    "encodec": (lambda: encodec.VectorQuantization(D, K, kmeans_init=False), (2, D, 20)),
    "rosinality": (lambda: rosinality.Quantize(D, K), (2, 20, D)),
    "llamagen": (lambda: llamagen.VectorQuantizer(K, D, 0.25, 0.0, True, True), (2, D, 4, 5)),
}


def made_under_bfloat16(build):
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = build()
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in layer.parameters():  # which follow the default
        parameter.data = parameter.data.float()
    return layer


NARROWED = {
    "default dtype": lambda layer, build: made_under_bfloat16(build),
    "cast": lambda layer, build: layer.bfloat16(),
    "assign": lambda layer, build: (
        layer.load_state_dict({k: v.bfloat16() for k, v in layer.state_dict().items()}, assign=True) and layer
    ),
    "put directly": lambda layer, build: (
        put_directly(layer, {name: buffer.bfloat16() for name, buffer in layer.named_buffers()}) or layer
    ),
}


@pytest.mark.parametrize("way", NARROWED)
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_learn_in_float32(name, way):
    build, shape = STATISTICS[name]
    layer = NARROWED[way](build(), build)
    layer(torch.randn(shape, dtype=next(layer.parameters(), torch.empty(0)).dtype))
    assert {b.dtype for b in layer.buffers() if b.dtype != torch.bool} == {torch.float32}


@pytest.mark.parametrize("build", [lambda: VectorQuantize(D, K, decay=0.999), lambda: rosinality.Quantize(D, K, 0.999)])
def test_averages_under_a_narrow_default_dtype_do_not_drift(build):
    torch.manual_seed(0)
    plain = build()
    narrow = made_under_bfloat16(build)
    narrow.load_state_dict(plain.state_dict())
    x = torch.randn(1, 30, D)
    for _ in range(20):
        plain(x), narrow(x)
    torch.testing.assert_close(narrow.state_dict(), plain.state_dict(), rtol=0, atol=0)


CONFIG = SimpleNamespace(codebook_size=K, codebook_dim=D, hidden_size=D)
CALLS = {
    "lucidrains": (lambda: VectorQuantize(D, K), (2, 20, D), 1),
    "learnable": (lambda: VectorQuantize(D, K, learnable_codebook=True, ema_update=False), (2, 20, D), 1),
    "DiVeQ": (lambda: VectorQuantize(D, K, directional_reparam=True), (2, 20, D), 1),
    "residual": (lambda: ResidualVQ(dim=D, num_quantizers=2, codebook_size=K), (2, 20, D), 1),
    "encodec": (lambda: encodec.VectorQuantization(D, K, kmeans_init=False), (2, D, 20), 1),
    "rosinality": (lambda: rosinality.Quantize(D, K), (2, 20, D), 2),
    "dac": (lambda: dac.VectorQuantize(D, K, 2), (2, D, 20), 3),
    "dac of transformers": (lambda: dac.DacVectorQuantize(CONFIG), (2, D, 20), 3),
    "taming": (lambda: taming.VectorQuantizer(K, D, 0.25), (2, D, 4, 5), 2),
    "diffusers": (lambda: diffusers.VectorQuantizer(K, D, 0.25), (2, D, 4, 5), 2),
    "llamagen": (lambda: llamagen.VectorQuantizer(K, D, 0.25, 0.0, True, True), (2, D, 4, 5), 2),
}


def gradients(layer: nn.Module, call, x: torch.Tensor, place: int, spoil: bool) -> list[torch.Tensor]:
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    results = call(x)
    if spoil:
        indices = results[place]
        (indices[-1] if isinstance(indices, tuple) else indices).fill_(0)
    leaves = torch.utils._pytree.tree_leaves(results)
    wanted = [r.square().sum() for r in leaves if torch.is_tensor(r) and r.requires_grad]
    return torch.autograd.grad(sum(wanted), [x, *layer.parameters()], allow_unused=True, materialize_grads=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CALLS)
def test_indices_may_be_changed_in_place_before_the_backward_pass(name):
    build, shape, place = CALLS[name]
    layer, spoilt, x = build(), build(), torch.randn(shape)
    spoilt.load_state_dict(layer.state_dict())
    expected = gradients(layer, layer, x, place, False)
    torch.testing.assert_close(gradients(spoilt, spoilt, x, place, True), expected)


def test_indices_of_the_function_may_be_changed_in_place():
    codes, rows = torch.randn(K, D, requires_grad=True), torch.randn(9, D)
    quantized, indices = pytorch_vqvae.vq_st(rows, codes)
    expected = torch.zeros(K, D).index_add_(0, indices.clone(), torch.ones(9, D))
    indices.fill_(0)
    assert torch.autograd.grad(quantized.sum(), codes)[0].equal(expected)


@pytest.mark.parametrize("name", ["lucidrains", "encodec", "residual"])
def test_projections_in_int8_work(name):
    layer = {
        "lucidrains": lambda: VectorQuantize(8, K, D),
        "encodec": lambda: encodec.VectorQuantization(8, K, D, kmeans_init=False),
        "residual": lambda: ResidualVQ(dim=8, codebook_dim=D, num_quantizers=2, codebook_size=K),
    }[name]()
    x = torch.randn(2, 8, 20) if name == "encodec" else torch.randn(2, 20, 8)
    expected = layer.eval()(x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), {nn.Linear}, dtype=torch.qint8)
    quantized, indices, *_ = small(x)
    assert quantized.shape == expected.shape and (quantized - expected).abs().mean() < 0.3
    decoded = small.decode(indices) if name == "encodec" else small.get_output_from_indices(indices)
    torch.testing.assert_close(decoded, quantized)
