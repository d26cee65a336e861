"""Autocast, low-precision modules and GradScaler: exact on the stored values, and no step poisons the codebook."""

import pytest
import torch
from torch import nn

from vqkernels import reference
from vqkernels.nn import VectorQuantizer
from vqkernels.nn.normalisation import unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_autocast_changes_no_index_and_no_state(dtype, ema_decay, backend):
    z = torch.randn(200, 8)
    runs = []
    for enabled in (False, True):
        torch.manual_seed(3)
        layer = VectorQuantizer(8, 64, ema_decay=ema_decay, backend=backend)
        with torch.autocast("cpu", dtype, enabled=enabled):
            runs.append([*layer(z), *layer.state_dict().values()])
    for plain, cast in zip(*runs, strict=True):
        assert plain.dtype == cast.dtype and plain.equal(cast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_projections_is_exact_on_what_the_projection_gave(dtype, backend):
    layer = VectorQuantizer(16, 64, codebook_dim=4, ema_decay=0.9, backend=backend)
    codes = layer.codebook.clone()
    z = torch.randn(100, 16, requires_grad=True)
    with torch.autocast("cpu", dtype):
        rows = layer.project_in(z)
        quantized, indices, loss = layer(z)
    assert rows.dtype == dtype and indices.equal(reference.nearest(rows, codes))
    counts, sums = reference.statistics(rows.detach(), indices, 64)
    assert layer.counts.equal(counts)
    torch.testing.assert_close(layer.ema_sums, (0.1 * sums).float(), rtol=1e-5, atol=1e-6)
    assert quantized.dtype == z.dtype and loss.dtype == torch.float32
    (quantized.sum() + loss).backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", ["euclidean", "dot", "cosine"])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_cast_modules_search_the_stored_values(dtype, metric, ema_decay, backend):
    layer = VectorQuantizer(6, 40, metric=metric, ema_decay=ema_decay, codebook_dim=5, backend=backend).to(dtype)
    assert layer.codebook.dtype == (dtype if ema_decay is None else torch.float32)
    z = torch.randn(80, 6, dtype=dtype)
    rows, codes = layer.project_in(z), layer.codebook.detach().clone()
    if metric == "cosine":
        rows, codes = unit(rows), unit(codes)
        assert rows.dtype == codes.dtype == torch.float32
    expected = reference.nearest(rows, codes, metric="dot" if metric == "cosine" else metric)
    quantized, indices, loss = layer(z)
    assert indices.equal(expected) and quantized.dtype == dtype and loss.dtype == torch.float32
    if ema_decay is not None:
        counts, sums = reference.statistics(rows.detach(), indices, 40)
        torch.testing.assert_close(layer.ema_sums, (0.1 * sums).float(), rtol=1e-5, atol=1e-6)
        assert layer.ema_counts.dtype == torch.float32


@pytest.mark.parametrize("manual", [False, True])
def test_every_floating_buffer_stays_wide(manual):
    layer = VectorQuantizer(4, 8, ema_decay=0.9, revive="rows", ema_update="manual" if manual else "forward")
    nn.Sequential(layer, nn.Linear(4, 4)).half()
    for name, buffer in layer.named_buffers():
        assert not buffer.is_floating_point() or buffer.dtype == torch.float32, name


def test_an_overflow_step_under_grad_scaler_leaves_the_codebook_of_the_finite_rows(backend):
    """A model whose activations overflow in float16: the step is skipped, and the EMA saw the finite rows alone."""
    layer = VectorQuantizer(4, 16, ema_decay=0.9, backend=backend)
    twin = VectorQuantizer(4, 16, ema_decay=0.9, backend=backend)
    twin.load_state_dict(layer.state_dict())
    encoder = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x = torch.randn(32, 4)
    x[3] = 1e38
    z = (encoder(x) * torch.where(torch.arange(32) == 3, 1e10, 1.0)[:, None]).half()
    bad = ~z.isfinite().all(1)
    assert bad.sum() == 1
    before = [p.clone() for p in encoder.parameters()]
    quantized, _, loss = layer(z)
    scaler.scale(quantized.float().square().mean() + loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0 and all(p.equal(b) for p, b in zip(encoder.parameters(), before, strict=True))
    twin(z[~bad])
    for name, value in twin.state_dict().items():
        assert layer.state_dict()[name].equal(value), name


def test_an_overflow_step_leaves_a_gradient_trained_codebook_alone(backend):
    layer = VectorQuantizer(4, 16, backend=backend)
    z = torch.randn(32, 4, requires_grad=True)
    with torch.no_grad():
        z[3] = torch.inf
    _, _, loss = layer(z)
    loss.backward()
    assert loss.isnan() and layer.codebook.grad.isfinite().all() and z.grad[3].isnan().all()
    clean = VectorQuantizer(4, 16, backend=backend)
    clean.load_state_dict(layer.state_dict())
    clean(torch.cat([z[:3], z[4:]]).detach())[2].backward()
    torch.testing.assert_close(layer.codebook.grad * 32, clean.codebook.grad * 31)


def test_unit_vectors_at_any_scale_and_at_zero():
    x = torch.tensor([[3.0, 4.0], [3e-30, 4e-30], [3e30, 4e30], [0.0, 0.0]], requires_grad=True)
    y = unit(x)
    torch.testing.assert_close(y[:3], torch.tensor([[0.6, 0.8]]).expand(3, 2))
    assert y[3].eq(0).all()
    y.sum().backward()
    assert x.grad.isfinite().all() and x.grad[3].eq(1).all()
    assert not unit(torch.tensor([[torch.nan, 1.0]])).isfinite().all()
    assert unit(torch.ones(2, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert unit(torch.ones(2, 2, dtype=torch.float64)).dtype == torch.float64
