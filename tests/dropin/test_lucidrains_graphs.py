"""The stand-ins under `torch.compile`: whole graphs, in training and not, with the results of the plain layers."""

import copy

import pytest
import torch

from vqkernels.dropin import lucidrains

CASES = {
    "defaults": ("VectorQuantize", {}),
    "expiry": ("VectorQuantize", {"threshold_ema_dead_code": 2}),
    "projected cosine": ("VectorQuantize", {"codebook_dim": 4, "use_cosine_sim": True}),
    "separate heads": ("VectorQuantize", {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}),
    "learnable": ("VectorQuantize", {"learnable_codebook": True, "ema_update": False}),
    "residual": ("ResidualVQ", {"num_quantizers": 3, "shared_codebook": True}),
    "simvq": ("SimVQ", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_one_graph(case, training):
    name, arguments = CASES[case]
    plain = getattr(lucidrains, name)(dim=8, codebook_size=20, **arguments).train(training)
    layer = copy.deepcopy(plain)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for one in (compiled, plain):
        x = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        quantized, indices, loss = one(x)
        if training:
            (quantized.square().sum() + loss.sum()).backward()
        results.append((quantized, indices, loss, x.grad))
    torch.testing.assert_close(*results)
    if case != "expiry":  # its rows are drawn from torch's generator
        torch.testing.assert_close(layer.state_dict(), plain.state_dict())
