"""The entropy penalty of the layer: what it adds to the loss and its gradients, in every layout, for every codebook."""

import copy
import itertools

import pytest
import torch

from vqkernels import reference
from vqkernels.nn import VectorQuantizer
from vqkernels.nn.normalisation import unit

WEIGHT, GAMMA, TEMPERATURE = 0.7, 0.6, 0.5
OPTIONS = {"entropy_weight": WEIGHT, "entropy_gamma": GAMMA, "entropy_temperature": TEMPERATURE}


def pair(*arguments, **options):
    """Two layers of the same codes and projections, one with the penalty."""
    layer = VectorQuantizer(*arguments, **options, **OPTIONS)
    layer.codebook.data.normal_()
    plain = copy.deepcopy(layer)
    plain.entropy_weight = None
    return layer, plain


def penalty(layer, z, mask=None):
    """The penalty by the reference, of z with its channels anywhere, differentiable in z and the layer's parameters."""
    z = z.movedim(layer.channel_dim, -1)
    if mask is not None:
        z = z.masked_fill(~mask.unsqueeze(-1), 0)
    rows = z if layer.project_in is None else layer.project_in(z)
    rows = rows.flatten(0, -2).unflatten(-1, (layer.heads, -1))
    kept = torch.ones(len(rows), dtype=torch.bool) if mask is None else mask.flatten()
    codes, metric = layer.codebook, layer.metric
    if metric == "cosine":
        rows, codes, metric = unit(rows), unit(codes), "dot"
    rows, kept = rows.movedim(1, 0), kept.expand(layer.heads, -1)
    if not layer.separate_codebooks:
        rows, kept = rows.flatten(0, 1), kept.flatten()
    sample, whole = reference.entropy_loss(rows, codes, TEMPERATURE, mask=kept, metric=metric)
    return WEIGHT * (sample - GAMMA * whole).mean()


def step(layer, z, **arguments):
    """The loss, and its gradients with respect to z and the parameters."""
    z = z.detach().requires_grad_()
    loss = layer(z, **arguments)[2]
    return [loss, *torch.autograd.grad(loss, [z, *layer.parameters()], materialize_grads=True)]


def added(layer, z, mask=None):
    z = z.detach().requires_grad_()
    value = penalty(layer, z, mask)
    return [value, *torch.autograd.grad(value, [z, *layer.parameters()], materialize_grads=True)]


def check(layer, plain, z, mask=None):
    expected = added(layer, z, mask)
    arguments = {} if mask is None else {"mask": mask}
    for with_it, without, more in zip(step(layer, z, **arguments), step(plain, z, **arguments), expected, strict=True):
        torch.testing.assert_close(with_it - without, more.to(with_it.dtype), rtol=1e-4, atol=2e-6)
    assert expected[1].abs().max() > 1e-5


@pytest.mark.parametrize("shape,channel_dim", [((9, 6), -1), ((4, 7, 6), -1), ((4, 6, 7), 1), ((2, 6, 3, 5), 1)])
@pytest.mark.parametrize("heads,separate", [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("masked", [False, True])
def test_layouts_heads_and_masks(shape, channel_dim, heads, separate, masked, backend):
    options = {"heads": heads, "separate_codebooks": separate, "channel_dim": channel_dim, "backend": backend}
    layer, plain = pair(6, 11, **options)
    z = torch.randn(shape)
    mask = torch.rand(z.select(channel_dim, 0).shape) < 0.6 if masked else None
    if mask is not None:
        z = torch.where(mask.unsqueeze(channel_dim), z, torch.nan)
    check(layer, plain, z, mask)


@pytest.mark.parametrize(
    "metric,codebook_dim,ema_decay",
    list(itertools.product(["euclidean", "dot", "cosine"], [None, 4], [None, 0.9])),
)
def test_metrics_projections_and_codebooks(metric, codebook_dim, ema_decay, backend):
    options = {"metric": metric, "codebook_dim": codebook_dim, "ema_decay": ema_decay, "backend": backend}
    layer, plain = pair(6, 11, **options)
    check(layer, plain, torch.randn(40, 6))


def test_moving_averages_are_those_without_it_and_the_gradient_is_of_the_codes_before_the_update(backend):
    layer, plain = pair(6, 11, ema_decay=0.5, revive="rows", backend=backend)
    for _ in range(3):
        z = torch.randn(50, 6)
        expected = added(layer, z)
        found, without = step(layer, z), step(plain, z)
        torch.testing.assert_close(found[1] - without[1], expected[1], rtol=1e-4, atol=2e-6)
        assert all(a.equal(b) for a, b in zip(layer.buffers(), plain.buffers(), strict=True))
    assert not layer.codebook.requires_grad


def test_only_in_training_and_without_a_gradient_of_a_frozen_codebook():
    layer, plain = pair(6, 11)
    z = torch.randn(30, 6)
    torch.testing.assert_close(layer(z, freeze=True)[2] - plain(z, freeze=True)[2], penalty(layer, z).float())
    assert step(layer, z, freeze=True)[2].eq(0).all()
    layer.eval(), plain.eval()
    assert layer(z)[2].equal(plain(z)[2])


def test_a_sum_of_entropies_is_lowered_by_descent():
    """Rows become decided and the codes evenly used, which is what the penalty is for."""
    layer = VectorQuantizer(4, 8, entropy_weight=1.0, entropy_temperature=1.0, beta=0.0)
    layer.codebook.data.normal_()
    z = torch.nn.Parameter(0.1 * torch.randn(200, 4))
    optimizer = torch.optim.Adam([z], lr=0.05)

    def entropies():
        return reference.entropy_loss(z.detach(), layer.codebook.detach(), 1.0)

    before = entropies()
    for _ in range(100):
        optimizer.zero_grad()
        layer(z)[2].backward()
        optimizer.step()
    after = entropies()
    assert after[0] < 0.5 * before[0] and after[1] > before[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_narrow_inputs(dtype, backend):
    layer, _ = pair(6, 11, codebook_dim=3, backend=backend)
    z = torch.randn(40, 6)
    with torch.autocast("cpu", dtype):
        loss, *gradients = step(layer, z)
    assert loss.dtype == torch.float32 and all(x.isfinite().all() for x in gradients)
    layer, plain = pair(6, 11, metric="cosine", backend=backend)
    narrow = z.to(dtype)
    difference = layer(narrow)[2] - plain(narrow)[2]
    torch.testing.assert_close(difference, penalty(layer, narrow).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_compiles_whole(ema_decay, backend):
    torch._dynamo.reset()
    layer, _ = pair(6, 11, heads=2, separate_codebooks=True, channel_dim=1, ema_decay=ema_decay, backend=backend)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        z, mask = torch.randn(3, 6, 5), torch.rand(3, 5) < 0.7
        for ours, theirs in zip(step(layer, z, mask=mask), step_of(compiled, twin, z, mask), strict=True):
            torch.testing.assert_close(ours, theirs)


def step_of(compiled, layer, z, mask):
    z = z.detach().requires_grad_()
    loss = compiled(z, mask=mask)[2]
    return [loss, *torch.autograd.grad(loss, [z, *layer.parameters()], materialize_grads=True)]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(entropy_weight=-1.0), "entropy_weight must be a finite number, at least 0, got -1.0"),
        (dict(entropy_weight="1"), "entropy_weight must be a finite number, at least 0, got '1'"),
        (dict(entropy_gamma=float("nan")), "entropy_gamma must be a finite number, at least 0, got nan"),
        (dict(entropy_temperature=0.0), "entropy_temperature must be a positive number, got 0.0"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(4, 8, **arguments)


def test_repr_says_what_differs():
    assert "entropy" not in repr(VectorQuantizer(4, 8))
    told = repr(VectorQuantizer(4, 8, entropy_weight=0.1, entropy_temperature=2.0))
    assert "entropy_weight=0.1, entropy_temperature=2.0" in told
