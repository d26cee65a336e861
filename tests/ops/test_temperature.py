"""Temperatures as tensors: one compiled graph for all values, the values of eager, and a sentence for bad ones."""

import pytest
import torch
from ops.entropy_gradients import scalar
from torch._dynamo.testing import CompileCounterWithBackend

import vqkernels as vq

VALUES = [0.1 * 1.3**i for i in range(20)]


def losses(z, codebook, temperature, backend):
    sample, whole = vq.entropy_loss(z * 1.5, codebook, temperature, backend=backend)
    drawn = vq.sample_code(z, codebook, temperature=temperature, seed=3, backend=backend)
    return sample - whole, drawn


@pytest.mark.parametrize("as_tensor", [True, False])
def test_one_graph_serves_all_temperatures(as_tensor, backend):
    """A tensor's first value compiles; a Python number's first value, and the second one for all that follow."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(losses, backend=counter, fullgraph=True)
    z, codebook, compilations = torch.randn(50, 4), torch.randn(9, 4), []
    for value in VALUES:
        temperature = scalar(value) if as_tensor else value
        results = []
        for function in (losses, compiled):
            leaf, codes = z.clone().requires_grad_(), codebook.clone().requires_grad_()
            loss, drawn = function(leaf, codes, temperature, backend)
            loss.backward()
            results.append((loss, drawn, leaf.grad, codes.grad))
        for eager, found in zip(*results, strict=True):
            assert eager.equal(found)
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0 if as_tensor else 1]


def test_a_tensor_is_the_number_it_holds(backend):
    z, codebook = torch.randn(50, 4), torch.randn(9, 4)
    for value in (0.3, 40):
        for one, other in zip(
            losses(z, codebook, value, backend), losses(z, codebook, scalar(value), backend), strict=True
        ):
            assert one.equal(other)
    nearest = vq.sample_code(z, codebook, temperature=scalar(0.0), seed=0, backend=backend)
    assert nearest.equal(vq.nearest_code(z, codebook))


def test_a_temperature_that_changes_before_the_backward_pass_changes_nothing(backend):
    z, codebook = torch.randn(50, 4), torch.randn(9, 4, requires_grad=True)
    grads = []
    for later in (0.5, 7.0):
        temperature = scalar(0.5)
        loss = sum(vq.entropy_loss(z, codebook, temperature, backend=backend))
        temperature.fill_(later)
        grads.append(torch.autograd.grad(loss, codebook)[0])
    assert grads[0].equal(grads[1])


@pytest.mark.parametrize(
    "bad,told",
    [
        (torch.tensor(1.0), "0-d float64 tensor on the CPU, got torch.float32 of shape \\[\\] on cpu"),
        (torch.ones(1, dtype=torch.float64), "got torch.float64 of shape \\[1\\] on cpu"),
        (torch.ones((), dtype=torch.float64, device="meta"), "got torch.float64 of shape \\[\\] on meta"),
        (scalar(1.0).requires_grad_(), "temperature gets no gradient: give temperature.detach"),
        (scalar(-1.0), "got -1.0"),
        (scalar(float("inf")), "got inf"),
        (scalar(float("nan")), "got nan"),
        ("1", "got '1'"),
        (True, "got True"),
    ],
)
def test_a_bad_temperature_is_one_sentence(bad, told):
    z, codebook = torch.randn(10, 3), torch.randn(4, 3)
    with pytest.raises(ValueError, match=told):
        vq.entropy_loss(z, codebook, bad)
    with pytest.raises(ValueError, match=told):
        vq.sample_code(z, codebook, temperature=bad, seed=0)


def test_a_compiled_graph_refuses_a_tensor_that_became_zero(backend):
    torch._dynamo.reset()
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="temperature must be positive"):
        compiled(torch.randn(50, 4), torch.randn(9, 4), scalar(0.0), backend)


@pytest.mark.parametrize("overload", ["default", "eager"])
def test_an_operator_refuses_another_dtype(overload, cpu_kernels):
    z, codebook = torch.randn(10, 3), torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="temperature must be a 0-d float64 tensor on the CPU"):
        getattr(torch.ops.vqkernels.entropy, overload)(z, codebook, None, 1, "dot", torch.tensor(1.0))
