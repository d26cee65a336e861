"""Every contender computes what it is said to compute; one that is not installed skips by name."""

import dataclasses

import pytest
import torch

from vqkernels import reference
from vqkernels.bench import entropy_peers
from vqkernels.bench.accuracy import judge
from vqkernels.bench.cases import CODEBOOKS, Case, default_cases, quick_cases
from vqkernels.bench.entropy_peers import ENTROPY
from vqkernels.bench.layers import TRAINING, OneHotQuantizer
from vqkernels.bench.peers import SEARCH, too_large, unavailable
from vqkernels.bench.residual_peers import RESIDUAL
from vqkernels.nn import VectorQuantizer


def apart(rows: int = 300, size: int = 40, dim: int = 16):
    """Rows so close to their codes that float32 cannot mistake them."""
    codes = torch.randn(size, dim)
    return codes[torch.randint(size, (rows,))] + 0.01 * torch.randn(rows, dim), codes


def needs(one):
    problem = unavailable(one.module, one.package)
    if problem:
        pytest.skip(f"{one.name}: {problem}")


@pytest.mark.parametrize(
    "peer",
    [pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.slow_start else []) for p in SEARCH],
)
def test_a_peer_finds_the_nearest_code(peer):
    needs(peer)
    z, codebook = apart()
    answer = peer.prepare(z, codebook)()
    if peer.name == "torch.mm alone":
        torch.testing.assert_close(answer, z @ codebook.T)
    else:
        assert answer.dtype == torch.int64 and torch.equal(answer, reference.nearest(z, codebook))


@pytest.mark.parametrize(
    "peer",
    [pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.slow_start else []) for p in ENTROPY],
)
def test_a_peer_computes_both_entropies_and_leaves_the_gradients(peer, monkeypatch):
    z, codebook = torch.randn(50, 6), torch.randn(20, 6)
    leaves, step = [], entropy_peers._step

    def watched(function, rows, codes):
        def kept(*inputs):
            leaves[:] = inputs
            return function(*inputs)

        return step(kept, rows, codes)

    monkeypatch.setattr(entropy_peers, "_step", watched)
    found = peer.prepare(z, codebook)()
    rows, codes = z.double().requires_grad_(), codebook.double().requires_grad_()
    expected = reference.entropy_loss(rows, codes, entropy_peers.TEMPERATURE)
    (expected[0] - expected[1]).backward()
    torch.testing.assert_close(found, torch.stack(expected).detach().float(), rtol=1e-5, atol=1e-5)
    for leaf, exact in zip(leaves, (rows, codes), strict=True):
        torch.testing.assert_close(leaf.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)


def test_our_entropies_are_compared_with_the_reference_before_anything_is_timed(monkeypatch):
    z, codebook = torch.randn(50, 6), torch.randn(20, 6)
    assert entropy_peers.mistake(z, codebook) is None
    right = entropy_peers._entropy_loss
    monkeypatch.setattr(entropy_peers, "_entropy_loss", lambda x, e: right(x, e.detach() + 1e-3 * e))
    assert "is off by" in entropy_peers.mistake(z, codebook)


@pytest.mark.parametrize("layer", TRAINING, ids=lambda one: one.name)
def test_a_layer_starts_from_the_codes_and_trains_them(layer):
    needs(layer)
    z, codebook = apart()
    forward, parameters = layer.build(codebook.clone())
    first = forward(z.clone().requires_grad_())
    torch.testing.assert_close(first[0].detach(), codebook[reference.nearest(z, codebook)], rtol=1e-5, atol=1e-5)
    assert parameters or "EMA" in layer.name
    before = [p.detach().clone() for p in parameters]
    again = dataclasses.replace(layer, build=lambda codes: (forward, parameters))
    assert torch.equal(again.prepare(z, codebook)(), reference.nearest(z, codebook))
    assert all(not torch.equal(p.detach(), b) for p, b in zip(parameters, before, strict=True))


def test_the_one_hot_layer_is_ours_written_the_usual_way():
    codebook, z = torch.randn(20, 8), torch.randn(2, 8, 5, 5)
    mine = VectorQuantizer(8, 20, channel_dim=1)
    mine.codebook.data.copy_(codebook)
    usual = OneHotQuantizer(codebook.clone())
    rows, incoming = [z.clone().requires_grad_() for _ in range(2)], torch.randn(z.shape)
    results = [layer(x) for layer, x in zip((mine, usual), rows, strict=True)]
    for quantized, _, loss in results:
        torch.autograd.backward([quantized, loss], [incoming, None])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(rows[0].grad, rows[1].grad)
    torch.testing.assert_close(mine.codebook.grad, usual.codebook.grad)


def test_a_missing_peer_names_the_pip_command():
    assert unavailable("torch", "") is None
    assert unavailable("no_such_module", "no-such").endswith("pip install no-such")
    assert too_large(1, 10, 10) is None and "GB" in too_large(6, 1 << 24, 1 << 24)


def test_data_are_the_same_in_every_run_and_of_the_kind_named():
    for kind in CODEBOOKS:
        case = Case("search", 200, 16, 4, kind)
        (z, codes), (z2, codes2) = case.data(), case.data()
        assert torch.equal(z, z2) and torch.equal(codes, codes2)
        assert z.shape == (200, 4) and codes.shape == (16, 4) and z.dtype == codes.dtype == torch.float32
        assert kind in case.label or kind == "gaussian"
    assert len(set(default_cases())) == len(default_cases())
    assert not set(default_cases()) & set(quick_cases())


@pytest.mark.parametrize("kind,peer", [(kind, peer) for kind, peers in RESIDUAL.items() for peer in peers])
def test_a_stack_starts_from_the_codes_and_finds_them(kind, peer):
    needs(peer)
    codebooks = torch.stack([torch.randn(40, 16), 0.1 * torch.randn(40, 16)])
    chosen = torch.randint(40, (300, 2))
    z = codebooks[0, chosen[:, 0]] + codebooks[1, chosen[:, 1]] + 1e-3 * torch.randn(300, 16)
    answers = {peer.name: peer.prepare(z, codebooks)()}
    assert answers[peer.name].equal(reference.residual_vector_quantize(z, codebooks)[1])
    assert judge(z, codebooks, answers).wrong == {peer.name: 0}
    answers[peer.name][:, 1] = (answers[peer.name][:, 1] + 1) % 40
    assert judge(z, codebooks, answers).wrong == {peer.name: 300}
