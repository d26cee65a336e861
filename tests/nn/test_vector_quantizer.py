"""VectorQuantizer: losses, EMA, masks, decoding, metrics, state, compile."""

import copy
import pickle

import pytest
import torch
from torch.func import functional_call

from vqkernels import reference
from vqkernels.nn import VectorQuantizer


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_loss_and_gradients_are_the_papers(ema_decay, backend):
    layer = VectorQuantizer(6, 20, beta=0.3, ema_decay=ema_decay, backend=backend)
    z = torch.randn(50, 6, requires_grad=True)
    codes = layer.codebook.detach().clone()
    quantized, indices, loss = layer(z)
    assert indices.equal(reference.nearest(z, codes)) and quantized.equal(codes[indices])
    (quantized.sum() + loss).backward()
    error = z.detach() - codes[indices]
    mean = error.square().mean()
    torch.testing.assert_close(loss, (1.3 if ema_decay is None else 0.3) * mean)
    torch.testing.assert_close(z.grad, 1 + 0.3 * 2 * error / z.numel())
    if ema_decay is None:
        expected = torch.zeros(20, 6).index_add_(0, indices, -2 * error / z.numel())
        torch.testing.assert_close(layer.codebook.grad, expected)
    else:
        assert not layer.codebook.requires_grad


def test_ema_follows_its_formula(backend):
    decay = 0.7
    layer = VectorQuantizer(4, 8, ema_decay=decay, backend=backend)
    codes = layer.codebook.double().clone()
    n, m = torch.zeros(8, dtype=torch.float64), torch.zeros(8, 4, dtype=torch.float64)
    for step in range(5):
        z = torch.randn(30, 4) * (1 + step)
        indices = reference.nearest(z, layer.codebook)
        counts, sums = reference.statistics(z, indices, 8)
        n, m = decay * n + (1 - decay) * counts, decay * m + (1 - decay) * sums
        codes = torch.where((counts > 0)[:, None], m / n[:, None].clamp_min(1e-30), layer.codebook.double())
        layer(z)
        torch.testing.assert_close(layer.codebook.double(), codes, rtol=1e-5, atol=1e-6)
    assert layer.ema_steps == 5


def test_unused_codes_stay_and_the_first_step_is_unbiased(backend):
    layer = VectorQuantizer(2, 10, ema_decay=0.99, backend=backend)
    before = layer.codebook.clone()
    z = 5 + torch.randn(100, 2)
    _, indices, _ = layer(z)
    used = torch.zeros(10, dtype=torch.bool).index_fill_(0, indices, True)
    assert layer.codebook[~used].equal(before[~used])
    for k in used.nonzero().flatten():
        torch.testing.assert_close(layer.codebook[k], z[indices == k].mean(0))


def test_one_bad_row_poisons_no_code(backend):
    layer = VectorQuantizer(4, 16, ema_decay=0.9, backend=backend)
    z = torch.randn(64, 4)
    z[5] = torch.nan
    _, _, loss = layer(z)
    assert loss.isnan() and layer.codebook.isfinite().all() and layer.ema_sums.isfinite().all()
    assert layer.counts.sum() == 63


def test_eval_changes_no_state_and_still_has_a_loss(backend):
    layer = VectorQuantizer(4, 16, ema_decay=0.9, backend=backend)
    layer(torch.randn(64, 4))
    state = copy.deepcopy(layer.state_dict())
    _, _, loss = layer.eval()(torch.randn(64, 4))
    assert loss > 0 and all(state[k].equal(v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (3, 6, 7), (9, 6), (2, 6, 3, 2, 2)])
def test_layouts_and_masks(shape, ema_decay, backend):
    layer = VectorQuantizer(6, 12, ema_decay=ema_decay, channel_dim=1, backend=backend)
    z = torch.randn(shape)
    mask = torch.rand(z.select(1, 0).shape) < 0.6
    z = torch.where(mask.unsqueeze(1), z, torch.nan)
    quantized, indices, loss = layer(z, mask=mask)
    assert quantized.shape == z.shape and indices.shape == mask.shape and loss.isfinite()
    assert indices[~mask].eq(-1).all() and quantized.movedim(1, -1)[~mask].eq(0).all()
    assert layer.counts.sum() == mask.sum()


def test_decode_inverts_and_checks():
    layer = VectorQuantizer(6, 12, channel_dim=1)
    quantized, indices, _ = layer(torch.randn(2, 6, 3, 5))
    assert layer.decode(indices).equal(quantized)
    assert layer.decode(torch.tensor([-1, 3])).movedim(1, -1)[0].eq(0).all()
    for bad in (12, -2):
        with pytest.raises(IndexError, match=f"indices must be in .-1, 11., got {bad}"):
            layer.decode(torch.tensor([0, bad]))
    with pytest.raises(TypeError, match="indices must be an integer tensor, got torch.float32"):
        layer.decode(torch.zeros(3))
    with pytest.raises(TypeError, match="indices must be an integer tensor, got list"):
        layer.decode([1, 2])
    with pytest.raises(ValueError, match="indices must have 3 heads on the last axis, got .5, 2."):
        VectorQuantizer(6, 12, heads=3).decode(torch.zeros(5, 2, dtype=torch.int64))


def test_perplexity_usage_and_dead_codes():
    layer = VectorQuantizer(1, 4)
    layer.codebook.data = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    layer(torch.tensor([[0.0], [0.1], [1.0], [0.9]]))
    assert layer.counts.tolist() == [2, 2, 0, 0]
    torch.testing.assert_close(layer.perplexity, torch.tensor(2.0))
    assert layer.usage == 0.5 and layer.dead_codes == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ema_state_survives_a_cast(dtype):
    layer = VectorQuantizer(4, 8, ema_decay=0.9)
    codes = layer.codebook.clone()
    layer.to(dtype)
    assert layer.codebook.dtype == layer.ema_sums.dtype == torch.promote_types(dtype, torch.float32)
    assert layer.codebook.float().equal(codes)
    z = torch.randn(20, 4).to(dtype)
    quantized, indices, _ = layer(z)
    assert quantized.dtype == dtype and indices.equal(reference.nearest(z, codes))
    layer.float()
    assert layer.codebook.dtype == layer.ema_sums.dtype == torch.float32
    layer.double().half()
    assert layer.codebook.dtype == layer.ema_sums.dtype == torch.float32


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_copies_pickles_and_functional_calls(ema_decay):
    layer = VectorQuantizer(4, 8, ema_decay=ema_decay)
    layer(torch.randn(30, 4))
    z = torch.randn(10, 4)
    layer.eval()
    expected = layer(z)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(a.equal(b) for a, b in zip(twin(z), expected, strict=True))
    fresh = VectorQuantizer(4, 8, ema_decay=ema_decay).eval()
    fresh.load_state_dict(layer.state_dict())
    assert all(a.equal(b) for a, b in zip(fresh(z), expected, strict=True))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    out = functional_call(VectorQuantizer(4, 8, ema_decay=ema_decay).eval(), state, (z,))
    assert all(a.equal(b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_compiles_whole_with_dynamic_shapes(ema_decay, backend):
    torch._dynamo.reset()
    plain = VectorQuantizer(6, 12, ema_decay=ema_decay, channel_dim=1, backend=backend)
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, fullgraph=True, dynamic=True)
    for mode in (True, False):
        plain.train(mode), twin.train(mode)
        for shape in ((2, 6, 4, 5), (3, 6, 7, 3)):
            z = torch.randn(shape)
            a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
            for layer, leaf in ((plain, a), (compiled, b)):
                quantized, indices, loss = layer(leaf)
                (quantized.square().sum() + loss).backward()
            torch.testing.assert_close(a.grad, b.grad)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(value, twin.state_dict()[name])


def test_backward_after_the_ema_update_uses_the_codes_that_were_looked_up():
    layer = VectorQuantizer(3, 5, beta=1.0, ema_decay=0.5)
    codes = layer.codebook.clone()
    z = torch.randn(20, 3, requires_grad=True)
    _, indices, loss = layer(z)
    loss.backward()
    torch.testing.assert_close(z.grad, 2 * (z.detach() - codes[indices]) / z.numel())


def test_extra_repr_names_what_is_not_default():
    assert repr(VectorQuantizer(4, 8)) == "VectorQuantizer(4, 8, beta=0.25)"
    layer = VectorQuantizer(4, 8, ema_decay=0.99, metric="cosine", channel_dim=1)
    assert repr(layer) == "VectorQuantizer(4, 8, beta=0.25, ema_decay=0.99, metric='cosine', channel_dim=1)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dim=0), "dim must be a positive int, got 0"),
        (dict(codebook_size=2.5), "codebook_size must be a positive int, got 2.5"),
        (dict(ema_decay=1.0), "ema_decay must be None or in .0, 1., got 1.0"),
        (dict(ema_decay="x"), "ema_decay must be None or in .0, 1., got 'x'"),
        (dict(beta=-1.0), "beta must be a finite number, at least 0, got -1.0"),
        (dict(beta=float("nan")), "beta must be a finite number, at least 0, got nan"),
        (dict(beta="a"), "beta must be a finite number, at least 0, got 'a'"),
        (dict(dim=True), "dim must be a positive int, got True"),
        (dict(channel_dim=None), "channel_dim must be an int, got None"),
        (dict(metric="l1"), "metric must be one of 'euclidean', 'dot', 'cosine', got 'l1'"),
        (dict(metric=["dot"]), "metric must be one of 'euclidean', 'dot', 'cosine', got .'dot'."),
        (dict(heads=3), "dim must be a multiple of heads=3 where codebook_dim is None, got 4"),
        (dict(codebook_dim=0), "codebook_dim must be a positive int, got 0"),
        (dict(separate_codebooks=1), "separate_codebooks must be True or False, got 1"),
        (dict(ema_update="late"), "ema_update must be one of 'forward', 'manual', got 'late'"),
        (dict(ema_update="manual"), 'ema_update="manual" needs ema_decay'),
        (dict(revive="on"), "revive must be one of 'off', 'rows', got 'on'"),
        (dict(revive_threshold=1), "revive_threshold must be a positive number below 1, got 1"),
        (dict(seed=0.5), "seed must be an int, got 0.5"),
    ],
)
def test_bad_arguments_are_one_clear_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**({"dim": 4, "codebook_size": 8} | arguments))


def test_wrong_channels_are_one_clear_sentence():
    with pytest.raises(ValueError, match="z must have 4 channels at channel_dim=-1, got .3, 5."):
        VectorQuantizer(4, 8)(torch.randn(3, 5))
    with pytest.raises(TypeError, match="z must be a tensor, got list"):
        VectorQuantizer(4, 8)([[0.0] * 4])
    with pytest.raises(TypeError, match="z must be float32, bfloat16, float16 or float64, got torch.int64"):
        VectorQuantizer(4, 8)(torch.zeros(3, 4, dtype=torch.int64))
