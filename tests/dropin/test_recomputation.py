"""A drop-in inside an activation checkpoint learns as it does without: gradients, averages, losses, random numbers."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vqkernels.dropin import encodec, llamagen, rosinality
from vqkernels.dropin.lucidrains import GroupedResidualVQ, ResidualVQ, VectorQuantize

D, K = 4, 10
SEQUENCE, IMAGES, SOUNDS = (3, 8, D), (3, D, 2, 4), (3, D, 8)
QUANTIZE = partial(VectorQuantize, D, K, decay=0.5)
RESIDUAL = partial(ResidualVQ, dim=D, num_quantizers=3, codebook_size=K, decay=0.5)
LAYERS = {
    "lucidrains": (QUANTIZE, SEQUENCE),
    "straight through": (partial(QUANTIZE, rotation_trick=False), SEQUENCE),
    "k-means": (partial(QUANTIZE, kmeans_init=True), SEQUENCE),
    "revival": (partial(QUANTIZE, threshold_ema_dead_code=2), SEQUENCE),
    "cosine": (partial(QUANTIZE, use_cosine_sim=True, codebook_dim=2), SEQUENCE),
    "heads": (partial(QUANTIZE, heads=2, separate_codebook_per_head=True, codebook_dim=3), SEQUENCE),
    "sampled": (partial(QUANTIZE, stochastic_sample_codes=True), SEQUENCE),
    "orthogonal": (
        partial(QUANTIZE, orthogonal_reg_weight=1.0, ema_update=True, orthogonal_reg_max_codes=5),
        SEQUENCE,
    ),
    "learnable and revived": (
        partial(QUANTIZE, learnable_codebook=True, ema_update=False, threshold_ema_dead_code=2),
        SEQUENCE,
    ),
    "cross entropy": (partial(QUANTIZE, commitment_use_cross_entropy_loss=True), SEQUENCE),
    "residual": (RESIDUAL, SEQUENCE),
    "shared": (partial(RESIDUAL, shared_codebook=True, threshold_ema_dead_code=2), SEQUENCE),
    "dropout": (partial(RESIDUAL, quantize_dropout=True, kmeans_init=True), SEQUENCE),
    "DiVeQ": (partial(RESIDUAL, diveq=True), SEQUENCE),
    "grouped": (
        partial(GroupedResidualVQ, dim=D, groups=2, num_quantizers=2, codebook_size=K, quantize_dropout=True),
        SEQUENCE,
    ),
    "rosinality": (partial(rosinality.Quantize, D, K, decay=0.5), SEQUENCE),
    "encodec": (partial(encodec.VectorQuantization, D, K, decay=0.5, kmeans_init=False), SOUNDS),
    "encodec k-means": (partial(encodec.VectorQuantization, D, K, 3, decay=0.5), SOUNDS),
    "encodec chain": (
        partial(encodec.ResidualVectorQuantization, num_quantizers=3, dim=D, codebook_size=K, decay=0.5),
        SOUNDS,
    ),
    "llamagen": (lambda: llamagen.VectorQuantizer(K, D, 0.25, 0.0, True, True), IMAGES),
}


class Model(nn.Module):
    """Layers that draw random numbers before and behind the quantizer; the loss and quantized go on."""

    def __init__(self, quantizer: nn.Module, axis: int) -> None:
        super().__init__()
        self.quantizer, self.axis = quantizer, axis
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x), 0.2)
        quantized, *rest = self.quantizer(x.movedim(-1, self.axis))
        losses = [part for part in torch.utils._pytree.tree_leaves(rest) if torch.is_tensor(part)]
        loss = sum(part.sum() for part in losses if part.is_floating_point())
        return F.dropout(self.last(quantized.movedim(self.axis, -1)), 0.2).square().mean() + loss


def trained(model: nn.Module, call, shape: tuple[int, ...], steps: int = 3, micro: int = 2) -> list[Tensor]:
    """Losses, gradients and state after some steps of two micro-batches each, whose backward passes come last."""
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        axis = model.axis
        xs = [torch.randn(shape, generator=generator).movedim(axis, -1).requires_grad_() for _ in range(micro)]
        losses = [call(model, x) for x in xs]
        optimizer.zero_grad()
        sum(losses).backward()
        results += [*losses, *(x.grad for x in xs), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return [*results, *model.state_dict().values(), torch.rand(1)]


def built(name: str) -> tuple[Model, tuple[int, ...]]:
    layer, shape = LAYERS[name]
    torch.manual_seed(3)
    return Model(layer(), -1 if shape is SEQUENCE else 1), shape


@pytest.mark.filterwarnings("ignore:k-means initialisation")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_checkpoint_changes_nothing(name, reentrant):
    model, shape = built(name)
    expected = trained(copy.deepcopy(model), lambda m, x: m(x), shape)
    found = trained(model, lambda m, x: checkpoint(m, x, use_reentrant=reentrant), shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:k-means initialisation")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("dropout", "grouped", "llamagen", "sampled")])
def test_a_checkpoint_around_a_compiled_layer_changes_nothing(name, reentrant):
    model, shape = built(name)
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compiled.quantizer.compile(backend="aot_eager")
    expected = trained(copy.deepcopy(model), lambda m, x: m(x), shape)
    found = trained(compiled, lambda m, x: checkpoint(m, x, use_reentrant=reentrant), shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_learns_without_gradients_inside_a_checkpoint_learns_once(reentrant):
    class Observed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer, self.linear = QUANTIZE(), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.quantizer(x)
            return self.linear(x).square().mean()

    model = Observed()
    other = copy.deepcopy(model)
    x = torch.randn(SEQUENCE)
    model(x).backward()
    checkpoint(other, x.clone().requires_grad_(), use_reentrant=reentrant).backward()
    torch.testing.assert_close(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("reentrant", [False, True])
def test_codes_and_averages_given_by_hand_count_once(reentrant):
    layer = VectorQuantize(D, K, threshold_ema_dead_code=2, decay=0.5)
    other = copy.deepcopy(layer)

    def learn(layer: VectorQuantize, x: Tensor) -> Tensor:
        _, indices, loss = layer(x, freeze_codebook=True)
        layer.update_indices(x, indices)
        layer.expire_codes_(x)
        return loss

    x = torch.randn(SEQUENCE)
    torch.manual_seed(1)
    learn(layer, x.clone().requires_grad_()).backward()
    torch.manual_seed(1)
    checkpoint(partial(learn, other), x.clone().requires_grad_(), use_reentrant=reentrant).backward()
    torch.testing.assert_close(other.state_dict(), layer.state_dict())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_accumulated_for_the_averages_are_taken_in_once(reentrant):
    layer = VectorQuantize(D, K, decay=0.5)
    other = copy.deepcopy(layer)
    x = torch.randn(SEQUENCE)
    for one, call in ((layer, lambda f, x: f(x)), (other, partial(checkpoint, use_reentrant=reentrant))):
        for accumulate in (True, False):
            call(lambda x: one(x, accum_ema_update=accumulate)[2], x.clone().requires_grad_()).backward()  # noqa: B023
    torch.testing.assert_close(other.state_dict(), layer.state_dict())
