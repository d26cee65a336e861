"""VQVAE: shapes for any image size, losses, gradients, encode/decode, compile, deepcopy, pickle."""

import copy
import io
import math
import pickle

import pytest
import torch

from vqkernels.models import VQVAE, PixelCNN


def small(**options) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(**{"in_channels": 3, "hidden_channels": 8, "code_dim": 4, "codebook_size": 16, **options})


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (9, 12), (13, 7), (1, 1), (5, 64)])
@pytest.mark.parametrize("downsamplings", [1, 2, 3])
def test_reconstruction_has_the_size_of_the_image(size, downsamplings):
    model = small(downsamplings=downsamplings)
    x = torch.randn(2, 3, *size)
    reconstruction, indices, losses = model(x)
    assert reconstruction.shape == x.shape
    factor = 2**downsamplings
    assert indices.shape == (2, -(-size[0] // factor), -(-size[1] // factor)) == (2, *model.latent_size(size))
    assert indices.dtype == torch.int64
    assert all(term.shape == () and term.isfinite() for term in losses)


def test_losses_are_mean_squared_error_plus_quantization():
    model, x = small(), torch.randn(2, 3, 9, 10)
    reconstruction, _, losses = model(x)
    torch.testing.assert_close(losses.reconstruction, (reconstruction - x).square().mean())
    torch.testing.assert_close(losses.total, losses.reconstruction + losses.quantization)


def test_quantization_term_is_codebook_plus_beta_commitment():
    model, x = small(beta=0.5), torch.randn(2, 3, 8, 8)
    _, indices, losses = model(x)
    z = model.encoder(x)
    code = model.quantizer.codebook[indices].permute(0, 3, 1, 2)
    torch.testing.assert_close(losses.quantization, 1.5 * (z - code).square().mean())


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_every_parameter_gets_a_gradient(ema_decay):
    model = small(ema_decay=ema_decay)
    model(torch.randn(4, 3, 12, 12))[2].total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_straight_through_gradient_reaches_the_encoder_unchanged():
    """The encoder's output gets the decoder's input gradient (section 3.2 of the paper), without the losses."""
    model, x = small(beta=0.0), torch.randn(2, 3, 8, 8)
    captured = {}
    model.encoder.register_forward_hook(lambda module, args, out: out.retain_grad() or captured.update(z=out))
    model.decoder.register_forward_pre_hook(lambda module, args: args[0].retain_grad() or captured.update(q=args[0]))
    model(x)[0].square().sum().backward()
    torch.testing.assert_close(captured["z"].grad, captured["q"].grad, rtol=0, atol=0)
    assert captured["q"].grad.any()


@pytest.mark.parametrize("size", [(8, 8), (9, 11)])
def test_encode_then_decode_is_the_reconstruction(size):
    model = small().eval()
    x = torch.randn(3, 3, *size)
    reconstruction, indices, _ = model(x)
    assert torch.equal(model.encode(x), indices)
    torch.testing.assert_close(model.decode(indices, size), reconstruction)


@pytest.mark.parametrize("ema_decay", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_model_still_decodes(dtype, ema_decay):
    model = small(ema_decay=ema_decay).to(dtype).eval()
    reconstruction, indices, _ = model(torch.randn(2, 3, 8, 8, dtype=dtype))
    assert reconstruction.dtype == dtype
    torch.testing.assert_close(model.decode(indices), reconstruction)


def test_decode_without_a_size_gives_the_padded_image():
    assert small().decode(torch.zeros(2, 3, 4, dtype=torch.int64)).shape == (2, 3, 12, 16)


def test_encode_leaves_the_ema_codebook_alone():
    model = small(ema_decay=0.5).train()
    before = copy.deepcopy(model.state_dict())
    model.encode(torch.randn(4, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.quantizer.training


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="downsamplings must be at least 1, but is 0"):
        VQVAE(downsamplings=0)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), but has shape \(2, 1, 8, 8\)"):
        small()(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="an image of 8x8 has 2x2 codes, but indices are 3x2"):
        small().decode(torch.zeros(1, 3, 2, dtype=torch.int64), (8, 8))


def test_deepcopy_pickle_and_weights_only_loading():
    model, x = small(ema_decay=0.9).eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)[0]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    restored = small(ema_decay=0.9).eval()
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), restored):
        assert torch.equal(twin(x)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph_with_dynamic_sizes(training):
    model = small(ema_decay=None).train(training)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in ((2, 3, 12, 12), (3, 3, 9, 14), (5, 3, 16, 7)):
        x = torch.randn(size)
        expected, indices, losses = model(x)
        found, found_indices, found_losses = compiled(x)
        torch.testing.assert_close(found, expected)
        assert torch.equal(found_indices, indices)
        torch.testing.assert_close(found_losses.total, losses.total)
        if training:
            found_losses.total.backward()
            assert model.encoder[0].weight.grad.any()


def test_an_empty_batch_has_zero_losses():
    model = small(ema_decay=None)
    reconstruction, indices, losses = model(torch.zeros(0, 3, 8, 8))
    losses.total.backward()
    assert losses == (0, 0, 0) and len(reconstruction) == len(indices) == 0


@pytest.mark.parametrize("likelihood", ["logistic_mixture", "gaussian", "categorical"])
def test_with_a_likelihood_the_error_is_minus_its_logarithm(likelihood):
    model = small(likelihood=likelihood)
    x = torch.randint(256, (2, 3, 9, 10)).float() / 127.5 - 1
    reconstruction, indices, losses = model(x)
    assert reconstruction.shape == x.shape
    z = model.quantizer.codebook[indices].permute(0, 3, 1, 2)
    decoded = model.decoder(z)[..., :9, :10]
    torch.testing.assert_close(losses.reconstruction, -model.likelihood.log_prob(decoded, x).sum() / x.numel())
    torch.testing.assert_close(model.decode(indices, (9, 10)), reconstruction, rtol=1e-4, atol=1e-4)
    losses.total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bits_per_dim_is_the_bound_with_the_uniform_and_with_a_trained_prior():
    model, x = small(likelihood="gaussian").eval(), torch.randint(256, (2, 3, 8, 12)).float() / 127.5 - 1
    nats = -model.likelihood.log_prob(model.decoder(model.quantizer(model.encoder(x))[0]), x)
    dimensions, codes = 3 * 8 * 12, 2 * 3
    uniform = (nats / math.log(2) + codes * 4) / dimensions
    torch.testing.assert_close(model.bits_per_dim(x), uniform.detach())
    prior = PixelCNN(16, hidden_channels=4, num_layers=2, num_classes=3, head_channels=8).eval()
    labels = torch.tensor([0, 2])
    log_probabilities = prior(model.encode(x), labels).log_softmax(1).gather(1, model.encode(x).unsqueeze(1))
    trained = (nats - log_probabilities.sum((1, 2, 3))) / math.log(2) / dimensions
    torch.testing.assert_close(model.bits_per_dim(x, prior, labels), trained.detach())


def test_bits_per_dim_needs_a_likelihood():
    with pytest.raises(ValueError, match="bits_per_dim needs a likelihood: build the VQVAE with"):
        small().bits_per_dim(torch.zeros(1, 3, 8, 8))
