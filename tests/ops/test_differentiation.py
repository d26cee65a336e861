"""Where gradients can flow and where not: indices that the caller overwrites, functorch, nested tensors."""

import pytest
import torch

import vqkernels as vq
from vqkernels.dropin.pytorch_vqvae import vq_st
from vqkernels.nn import GroupedResidualVectorQuantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer
from vqkernels.ops.quantize import quantize_with_statistics

FUNCTIONS = {
    "quantize": lambda z, codes: vq.vector_quantize(z, codes),
    "sampled": lambda z, codes: quantize_with_statistics(z, codes, indices=torch.arange(len(z)) % len(codes)),
    "residual": lambda z, codes: vq.residual_vector_quantize(z, codes.expand(2, -1, -1)),
    "vq_st": lambda z, codes: vq_st(z, codes),
}
LAYERS = {
    "quantizer": lambda **options: VectorQuantizer(4, 8, **options),
    "heads": lambda **options: VectorQuantizer(4, 8, heads=2, **options),
    "sampled": lambda **options: VectorQuantizer(4, 8, temperature=1.0, **options),
    "residual": lambda **options: ResidualVectorQuantizer(4, 8, 3, **options),
    "grouped": lambda **options: GroupedResidualVectorQuantizer(4, 8, 3, 2, **options),
    "simvq": lambda **options: SimVQ(4, 8, **options),
}
CALLS = {
    "nearest_code": lambda z, codes: vq.nearest_code(z, codes),
    "vector_quantize": lambda z, codes: vq.vector_quantize(z, codes)[0],
    "residual_vector_quantize": lambda z, codes: vq.residual_vector_quantize(z, codes.expand(2, -1, -1))[0],
    "entropy_loss": lambda z, codes: vq.entropy_loss(z, codes, 1.0)[0],
    "sample_code": lambda z, codes: vq.sample_code(z, codes, temperature=1.0, seed=0),
}


def gradients(function, overwrite):
    z, codes = torch.arange(40.0).view(10, 4).requires_grad_(), torch.eye(4).mul(30).requires_grad_()
    quantized, indices = function(z, codes)[:2]
    if overwrite:
        indices.fill_(0)
    return torch.autograd.grad((quantized * torch.arange(4)).sum(), (z, codes), allow_unused=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_caller_may_overwrite_the_indices_before_the_backward_pass(name, compiled):
    torch._dynamo.reset()
    function = torch.compile(FUNCTIONS[name], backend="inductor") if compiled else FUNCTIONS[name]
    for left, overwritten in zip(gradients(function, False), gradients(function, True), strict=True):
        assert left is overwritten is None or left.equal(overwritten)


@pytest.mark.parametrize("name", LAYERS)
def test_a_caller_may_overwrite_the_indices_of_a_layer(name, backend):
    layer = LAYERS[name](backend=backend)
    z = torch.randn(10, 4, requires_grad=True)
    quantized, indices, loss = layer(z)
    found = torch.autograd.grad(quantized.sum() + loss.sum(), [z, *layer.parameters()], retain_graph=True)
    indices.fill_(0)
    again = torch.autograd.grad(quantized.sum() + loss.sum(), [z, *layer.parameters()])
    assert all(a.equal(b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_a_gradient_nothing_is_recorded_and_the_values_are_the_same(name):
    z, codes = torch.randn(10, 4), torch.randn(6, 4)
    recorded = FUNCTIONS[name](z.requires_grad_(), codes)
    with torch.no_grad():
        silent = FUNCTIONS[name](z, codes)
    assert recorded[0].requires_grad and not silent[0].requires_grad
    assert all(a.equal(b) for a, b in zip(recorded, silent, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_vmap_is_refused_with_what_to_do(name, backend):
    with vq.use_backend(backend), pytest.raises(RuntimeError, match="leading axes of z, and one codebook for each as"):
        torch.vmap(CALLS[name], (0, None))(torch.randn(3, 10, 4), torch.randn(6, 4))


@pytest.mark.parametrize("name", ["vector_quantize", "residual_vector_quantize", "entropy_loss"])
def test_vmap_over_gradients_is_refused_with_what_to_do(name):
    def loss(z, codes):
        return CALLS[name](z, codes).sum()

    with pytest.raises(RuntimeError, match="leading axes of z, and one codebook for each as"):
        torch.vmap(torch.func.grad(loss), (0, None))(torch.randn(3, 10, 4), torch.randn(6, 4))


@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_is_refused_with_what_to_do(name):
    z, codes = torch.randn(10, 4), torch.randn(6, 4)
    with pytest.raises(RuntimeError, match="does not support forward-mode derivatives, but z has a tangent: use"):
        torch.func.jvp(lambda x: CALLS[name](x, codes), (z,), (z,))


def test_functorch_gives_the_gradients_of_autograd():
    """Of a function, and of a layer called with given parameters."""
    z, codes = torch.randn(10, 4), torch.randn(6, 4)

    def loss(z, codes):
        quantized, _, codebook_loss, commitment_loss = vq.vector_quantize(z, codes)
        return (quantized.square().sum() + codebook_loss + commitment_loss) + sum(vq.entropy_loss(z, codes, 1.0))

    found = torch.func.grad(loss, (0, 1))(z, codes)
    leaves = z.clone().requires_grad_(), codes.clone().requires_grad_()
    assert all(a.equal(b) for a, b in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True))

    layer = VectorQuantizer(4, 8).eval()
    parameters = {name: x.detach() for name, x in layer.named_parameters()}
    found = torch.func.grad(lambda given: torch.func.functional_call(layer, given, z)[2])(parameters)
    layer(z)[2].backward()
    assert found["codebook"].equal(layer.codebook.grad)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("name", [*CALLS, *LAYERS])
def test_a_nested_tensor_is_refused_with_what_to_do(name, layout):
    z = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=layout)
    call = (lambda z, _: LAYERS[name]()(z)) if name in LAYERS else CALLS[name]
    with pytest.raises(TypeError, match="z must be a dense tensor, got a nested one: pad it .* the lengths"):
        call(z, torch.randn(6, 4))
