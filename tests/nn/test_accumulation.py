"""Gradient accumulation, freezing and what each leaves alone."""

import copy

import pytest
import torch

from vqkernels.nn import VectorQuantizer


def states_equal(a, b):
    return all(value.equal(b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("heads", [(1, False), (2, False), (2, True)])
def test_micro_batches_make_the_step_of_the_whole_batch(heads, backend):
    arguments = dict(heads=heads[0], separate_codebooks=heads[1], ema_decay=0.8, backend=backend)
    whole = VectorQuantizer(4, 8, **arguments).double()
    parts = VectorQuantizer(4, 8, ema_update="manual", **arguments).double()
    parts.load_state_dict(whole.state_dict())
    for _ in range(3):
        z = torch.randn(30, 4, dtype=torch.float64)
        whole(z)
        codes = parts.codebook.clone()
        for part in z.split([7, 0, 13, 10]):
            leaf = part.clone().requires_grad_()
            quantized, _, loss = parts(leaf)
            (quantized.sum() + loss).backward()
            assert parts.codebook.equal(codes)
        parts.update_codebook()
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-12, atol=1e-14)
    assert parts.ema_steps == 3 and set(parts.state_dict()) == set(whole.state_dict())


def test_an_update_without_forwards_moves_no_code():
    layer = VectorQuantizer(4, 8, ema_decay=0.8, ema_update="manual", revive="rows")
    layer(torch.randn(40, 4))
    layer.update_codebook()
    before = layer.codebook.clone()
    layer.update_codebook()
    assert layer.codebook.equal(before)


def test_update_codebook_is_for_the_manual_mode():
    with pytest.raises(RuntimeError, match='update_codebook.. is for ema_update="manual"'):
        VectorQuantizer(4, 8, ema_decay=0.9).update_codebook()


@pytest.mark.parametrize("arguments", [dict(), dict(ema_decay=0.9), dict(ema_decay=0.9, ema_update="manual")])
def test_freeze_changes_no_state_and_no_value(arguments, backend):
    layer = VectorQuantizer(4, 8, revive="rows", backend=backend, **arguments)
    layer(torch.randn(40, 4))
    before = copy.deepcopy(layer)
    z = torch.randn(20, 4)
    frozen = layer(z.requires_grad_(), freeze=True)
    assert states_equal(layer, before)
    assert all(b.equal(a) for (_, a), (_, b) in zip(layer.named_buffers(), before.named_buffers(), strict=True))
    free = before(z)
    assert all(a.equal(b) for a, b in zip(frozen, free, strict=True))
    frozen[2].backward()
    assert layer.codebook.grad is None and z.grad.abs().sum() > 0


def test_a_parameter_without_gradient_is_frozen_but_still_counted():
    layer = VectorQuantizer(4, 8, revive="rows").requires_grad_(False)
    before = layer.codebook.clone()
    for _ in range(20):
        layer(10 + torch.randn(40, 4))
    assert layer.codebook.equal(before) and layer.counts.sum() == 40 and layer.ema_steps == 0


def test_the_commitment_loss_is_there_in_eval(backend):
    layer = VectorQuantizer(4, 8, ema_decay=0.9, beta=0.5, backend=backend).eval()
    z = torch.randn(20, 4)
    quantized, _, loss = layer(z)
    torch.testing.assert_close(loss, 0.5 * (z - quantized).square().mean())
