"""What the peer's README shows of its four classes, at its arguments and shapes, with only the import line changed."""

import torch

from vqkernels.dropin.lucidrains import GroupedResidualVQ, ResidualVQ, SimVQ, VectorQuantize


def shapes(results):
    return [tuple(result.shape) for result in results]


def sequence(channels=256):
    return torch.randn(1, 1024, channels)


def test_vector_quantize():
    layer = VectorQuantize(dim=256, codebook_size=512, decay=0.8, commitment_weight=1.0)
    assert shapes(layer(sequence())) == [(1, 1024, 256), (1, 1024), ()]


def test_residual():
    layer = ResidualVQ(dim=256, num_quantizers=8, codebook_size=1024)
    assert shapes(layer(sequence())) == [(1, 1024, 256), (1, 1024, 8), (8,)]
    assert layer(sequence(), return_all_codes=True)[3].shape == (8, 1, 1024, 256)


def test_residual_with_codes_that_learn_through_the_output():
    layer = ResidualVQ(dim=256, num_quantizers=8, codebook_size=1024, diveq=True)
    quantized, _, losses = layer(sequence())
    quantized.square().mean().backward()
    assert losses.eq(0).all() and all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_sampled_residual_with_one_codebook():
    layer = ResidualVQ(
        dim=256,
        num_quantizers=8,
        codebook_size=1024,
        stochastic_sample_codes=True,
        sample_codebook_temp=0.1,
        shared_codebook=True,
    )
    assert shapes(layer(sequence())) == [(1, 1024, 256), (1, 1024, 8), (8,)]


def test_grouped():
    layer = GroupedResidualVQ(dim=256, num_quantizers=8, groups=2, codebook_size=1024)
    assert shapes(layer(sequence())) == [(1, 1024, 256), (2, 1, 1024, 8), (2, 8)]


def test_kmeans():
    layer = ResidualVQ(dim=256, codebook_size=256, num_quantizers=4, kmeans_init=True, kmeans_iters=10)
    assert shapes(layer(sequence())) == [(1, 1024, 256), (1, 1024, 4), (4,)]


def test_gradients():
    x = sequence().requires_grad_()
    for arguments in ({"rotation_trick": True}, {"directional_reparam": True, "directional_reparam_variance": 5e-3}):
        quantized, _, loss = VectorQuantize(dim=256, codebook_size=256, **arguments)(x)
        (gradient,) = torch.autograd.grad(quantized.square().sum() + loss, x)
        assert gradient.isfinite().all() and gradient.any()


def test_lower_dimension_cosine_and_expiry():
    for arguments in ({"codebook_dim": 16}, {"use_cosine_sim": True}, {"threshold_ema_dead_code": 2}):
        layer = VectorQuantize(dim=256, codebook_size=512, **arguments)
        assert shapes(layer(sequence())) == [(1, 1024, 256), (1, 1024), ()]


def test_orthogonal_codes_of_an_image():
    layer = VectorQuantize(
        dim=256,
        codebook_size=256,
        accept_image_fmap=True,
        orthogonal_reg_weight=10,
        orthogonal_reg_max_codes=128,
        orthogonal_reg_active_codes_only=False,
    )
    x = torch.randn(1, 256, 32, 32)
    *results, parts = layer(x, return_loss_breakdown=True)
    assert shapes(results) == [(1, 256, 32, 32), (1, 32, 32), ()]
    torch.testing.assert_close(results[2], parts.commitment + 10 * parts.orthogonal_reg)


def test_heads_of_an_image():
    layer = VectorQuantize(
        dim=256,
        codebook_dim=32,
        heads=8,
        separate_codebook_per_head=True,
        codebook_size=8196,
        accept_image_fmap=True,
    )
    x = torch.randn(1, 256, 32, 32)
    assert shapes(layer(x)) == [(1, 256, 32, 32), (1, 32, 32, 8), ()]


def test_simvq():
    layer = SimVQ(dim=512, codebook_size=1024, rotation_trick=True)
    x = sequence(512)
    quantized, indices, _ = layer(x)
    assert quantized.shape == x.shape
    assert torch.allclose(quantized, layer.indices_to_codes(indices), atol=1e-6)
