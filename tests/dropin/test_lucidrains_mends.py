"""What the peer cannot do or gets wrong: masks in every layout, images in a chain, bad rows, options told by name."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vqkernels import reference
from vqkernels.dropin.lucidrains import GroupedResidualVQ, ResidualVQ, SimVQ, VectorQuantize

LAYOUTS = {
    "heads": ({"heads": 2, "codebook_dim": 4}, (2, 30, 8)),
    "separate heads": ({"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}, (2, 30, 8)),
    "codebook_dim": ({"codebook_dim": 3}, (2, 30, 8)),
    "channels first heads": ({"heads": 2, "codebook_dim": 4, "channel_last": False}, (2, 8, 30)),
    "image": ({"accept_image_fmap": True}, (2, 8, 5, 6)),
    "image projected": ({"accept_image_fmap": True, "codebook_dim": 3}, (2, 8, 5, 6)),
    "cosine heads": ({"heads": 2, "codebook_dim": 4, "use_cosine_sim": True}, (2, 30, 8)),
    "one token": ({}, (30, 8)),
}


def layer_of(**arguments) -> VectorQuantize:
    torch.manual_seed(1)
    return VectorQuantize(**{"dim": 8, "codebook_size": 20} | arguments)


@pytest.mark.parametrize("case", LAYOUTS)
def test_masked_rows_are_as_if_they_were_not_there(case):
    arguments, shape = LAYOUTS[case]
    layer = layer_of(**arguments)
    alone = copy.deepcopy(layer)
    axis = 1 if layer._channels_first else len(shape) - 1
    x = torch.randn(shape)
    mask = torch.rand([n for i, n in enumerate(shape) if i != axis]) < 0.6
    poisoned = x.masked_fill(~mask.unsqueeze(axis), torch.nan).requires_grad_()
    quantized, indices, loss = layer(poisoned, mask=mask)
    kept = x.movedim(axis, -1)[mask].requires_grad_()
    alone.accept_image_fmap, alone.channel_last = False, True
    expected, few, other_loss = alone(kept)
    torch.testing.assert_close(quantized.movedim(axis, -1)[mask], expected)
    assert indices[mask].equal(few) and indices[~mask].eq(-1).all()
    assert quantized.movedim(axis, -1)[~mask].eq(0).all()
    torch.testing.assert_close(loss, other_loss)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name])
    (quantized.square().sum() + loss).backward()
    (expected.square().sum() + other_loss).backward()
    torch.testing.assert_close(poisoned.grad.movedim(axis, -1)[mask], kept.grad)
    assert poisoned.grad.movedim(axis, -1)[~mask].eq(0).all()


def test_lens_with_channels_first():
    layer = layer_of(channel_last=False).eval()
    indices = layer(torch.randn(2, 8, 30), lens=torch.tensor([30, 4]))[1]
    assert indices[0].ge(0).all() and indices[1, :4].ge(0).all() and indices[1, 4:].eq(-1).all()
    with pytest.raises(ValueError, match="lens is for sequences"):
        layer_of(accept_image_fmap=True)(torch.randn(1, 8, 4, 4), lens=torch.tensor([3]))


@pytest.mark.parametrize(
    "arguments", [{}, {"use_cosine_sim": True}, {"codebook_dim": 4}, {"threshold_ema_dead_code": 2}]
)
def test_a_bad_row_poisons_no_codebook(arguments):
    layer = layer_of(**arguments)
    x = torch.randn(2, 30, 8)
    x[0, 3, 2], x[1, 4, 1] = torch.nan, torch.inf
    quantized, indices, loss = layer(x)
    assert loss.isnan() and indices[0, 3] == 0 and indices[1, 4] == 0
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    assert layer._codebook.cluster_size.sum() > 0


def test_no_rows():
    for arguments, shape in (
        ({}, (0, 5, 8)),
        ({"threshold_ema_dead_code": 2}, (2, 0, 8)),
        ({"kmeans_init": True}, (0, 8)),
    ):
        layer = layer_of(**arguments)
        x = torch.zeros(shape, requires_grad=True)
        quantized, indices, loss = layer(x)
        assert loss == 0 and quantized.shape == shape and indices.shape == shape[:-1]
        (quantized.sum() + loss).backward()
        assert all(value.isfinite().all() for value in layer.state_dict().values())
        assert layer(x, indices=indices)[1] == 0
    mask = torch.zeros(2, 5, dtype=torch.bool)
    assert layer_of()(torch.randn(2, 5, 8), mask=mask)[2] == 0


def test_kmeans_leaves_no_zero_codes():
    layer = layer_of(kmeans_init=True, codebook_size=64)
    quantized, indices, loss = layer(torch.randn(1, 30, 8))
    assert layer._codebook.initted and len(layer.codebook.unique(dim=0)) == 64
    assert layer.codebook.any(1).all() and loss < 1e-3  # every row is near a code of its own
    for arguments in ({"use_cosine_sim": True}, {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}):
        layer = layer_of(kmeans_init=True, **arguments).eval()
        x = torch.randn(4, 200, 8)
        layer(x)
        first = layer.codebook.clone()
        assert first.isfinite().all() and first.any(-1).all()
        layer(x)
        assert layer.codebook.equal(first)


def test_the_code_comes_out_to_the_bit_and_ties_go_down():
    layer = layer_of()
    layer.codebook = torch.randn(10, 8).repeat(2, 1)
    codes = layer.codebook.clone()
    x = torch.randn(50, 8)
    x[0] = 0  # without a direction
    quantized, indices, _ = layer(x.requires_grad_())
    assert quantized.equal(codes[indices]) and indices.equal(reference.nearest(x, codes)) and (indices < 10).all()
    (gradient,) = torch.autograd.grad(quantized.sum(), x)
    assert gradient[0].eq(1).all() and gradient.isfinite().all()


def test_masked_indices_decode_to_zeros():
    for arguments in ({}, {"codebook_dim": 3}):
        layer = layer_of(**arguments)
        assert layer.get_codes_from_indices(torch.tensor([[0, -1]]))[0, 1].eq(0).all()


@pytest.mark.parametrize(
    "arguments", [{}, {"codebook_dim": 3}, {"shared_codebook": True}, {"threshold_ema_dead_code": 2}]
)
def test_a_chain_over_images(arguments):
    torch.manual_seed(1)
    layer = ResidualVQ(dim=8, num_quantizers=3, codebook_size=20, accept_image_fmap=True, **arguments)
    x = torch.randn(2, 8, 5, 7, requires_grad=True)
    quantized, indices, losses = layer(x)
    assert quantized.shape == x.shape and indices.shape == (2, 5, 7, 3) and losses.shape == (3,)
    (quantized.sum() + losses.sum()).backward()
    layer.eval()
    quantized, indices, losses, codes = layer(x, return_all_codes=True)
    assert codes.shape == (3, 2, 5, 7, arguments.get("codebook_dim", 8)) and losses.eq(0).all()
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized)
    grouped = GroupedResidualVQ(dim=8, groups=2, num_quantizers=2, codebook_size=20, accept_image_fmap=True).eval()
    quantized, indices, _ = grouped(x)
    assert quantized.shape == x.shape and indices.shape == (2, 2, 5, 7, 2)
    torch.testing.assert_close(grouped.get_output_from_indices(indices), quantized)


def test_cross_entropy_in_a_chain_is_the_sum_of_its_levels():
    torch.manual_seed(1)
    layer = ResidualVQ(dim=8, num_quantizers=2, codebook_size=20).eval()
    x, given = torch.randn(2, 30, 8, requires_grad=True), torch.randint(0, 20, (2, 30, 2))
    quantized, loss = layer(x, indices=given)
    codes = layer.codebooks
    first = codes[0][torch.cdist(x, codes[0]).argmin(-1)]
    logits = [-torch.cdist(r.detach(), codes[i]).flatten(0, 1) for i, r in enumerate((x, x - first))]
    expected = sum(F.cross_entropy(one, given[..., i].flatten()) for i, one in enumerate(logits))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(quantized, layer(x)[0])
    assert torch.autograd.grad(loss, x)[0].any()
    grouped = GroupedResidualVQ(dim=8, groups=2, num_quantizers=2, codebook_size=20)
    assert grouped(x, indices=torch.randint(0, 20, (2, 2, 30, 2)))[1] > 0


def test_sampling_follows_the_distances():
    layer = layer_of(dim=2, codebook_size=4, stochastic_sample_codes=True, sample_codebook_temp=0.5)
    layer.codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [torch.nan, 0.0]])
    x = torch.tensor([0.3, 0.1]).expand(1, 20000, 2)
    indices = layer(x, freeze_codebook=True)[1]
    distance = (x[0, :1] - layer.codebook[:3]).norm(dim=1)
    expected = (-distance / 0.5).softmax(0)
    frequencies = torch.bincount(indices.flatten(), minlength=4) / 20000
    assert frequencies[3] == 0
    torch.testing.assert_close(frequencies[:3], expected, rtol=0, atol=5 * math.sqrt(0.25 / 20000))
    x = torch.randn(1, 30, 2)
    mask = torch.arange(30).view(1, 30) < 11
    assert layer(x, mask=mask)[1].eq(-1).equal(~mask)


def test_no_row_is_taken_twice_and_few_rows_replace_few_codes():
    layer = layer_of(threshold_ema_dead_code=10, codebook_size=100)
    x = torch.randn(1, 30, 8)
    layer(x)
    replaced = layer._codebook.cluster_size[0] == 10
    codes = layer.codebook[replaced]
    assert replaced.sum() == 30 and (codes.unsqueeze(1) == x[0]).all(-1).any(1).all()
    assert len(codes.unique(dim=0)) == 30


def test_state_stays_wide_when_the_module_is_narrowed():
    layer = layer_of().bfloat16()
    assert all(value.dtype in (torch.float32, torch.bool) for value in layer.state_dict().values())
    x = torch.randn(2, 30, 8).bfloat16().requires_grad_()
    quantized, _, loss = layer(x)
    assert quantized.dtype == torch.bfloat16 and loss.dtype == torch.float32
    (quantized.float().sum() + loss).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = layer_of(codebook_dim=4)
        layer(torch.randn(2, 30, 8))
        assert layer._codebook.embed.dtype == torch.float32


def test_a_chain_survives_its_own_update_before_backward():
    """The shared codebook is overwritten after the last level; the gradient is at the codes that were looked up."""
    torch.manual_seed(1)
    layer = ResidualVQ(dim=8, num_quantizers=2, codebook_size=20, shared_codebook=True, orthogonal_reg_weight=1.0)
    frozen = copy.deepcopy(layer)
    x = torch.randn(2, 30, 8, requires_grad=True)
    gradients = []
    for one, options in ((layer, {}), (frozen, {"freeze_codebook": True})):
        quantized, _, _ = one(x, **options)
        gradients.append(torch.autograd.grad(quantized.square().sum(), x)[0])
    torch.testing.assert_close(*gradients)
    layer(x)[2].sum().backward()


@pytest.mark.parametrize("arguments", [{}, {"orthogonal_reg_weight": 1.0}, {"threshold_ema_dead_code": 3}])
@pytest.mark.parametrize("freeze", [True, False])
def test_two_forwards_before_one_backward(arguments, freeze):
    layer = layer_of(**arguments)
    alone = copy.deepcopy(layer)
    x = torch.randn(2, 30, 8, requires_grad=True)
    first = layer(x, freeze_codebook=freeze)
    layer(torch.randn(2, 30, 8))
    gradients = []
    for quantized, _, loss in (first, alone(x, freeze_codebook=freeze)):
        gradients.append(torch.autograd.grad(quantized.square().sum() + loss, x)[0])
    torch.testing.assert_close(*gradients)


def test_options_without_a_counterpart_are_named():
    for name, value in (
        ("straight_through", True),
        ("codebook_diversity_loss_weight", 0.5),
        ("vq_bridge", torch.nn.Identity()),
        ("in_place_codebook_optimizer", torch.optim.SGD),
        ("affine_param", True),
    ):
        with pytest.raises(ValueError, match=f"{name}=.* is not supported"):
            layer_of(**{name: value})
    for name, value in (("topk", 3), ("codebook_transform_fn", torch.sin)):
        with pytest.raises(ValueError, match=f"{name}=.* is not supported"):
            layer_of()(torch.randn(1, 4, 8), **{name: value})
    for name, value in (("heads", 2), ("implicit_neural_codebook", True), ("beam_size", 4), ("eval_beam_size", 4)):
        with pytest.raises(ValueError, match=f"{name}=.* is not supported"):
            ResidualVQ(dim=8, num_quantizers=2, codebook_size=4, **{name: value})
    with pytest.raises(ValueError, match="beam_size=2 is not supported"):
        ResidualVQ(dim=8, num_quantizers=2, codebook_size=4)(torch.randn(1, 4, 8), beam_size=2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"learnable_codebook": True}, "learnable_codebook needs ema_update=False"),
        ({"learnable_codebook": True, "ema_update": False, "use_cosine_sim": True}, "use_cosine_sim and learnable"),
        ({"sync_update_v": 0.5}, "sync_update_v needs learnable_codebook"),
        ({"sync_update_v": 2.0}, "sync_update_v must be in .0, 1., got 2.0"),
        ({"rotation_trick": True, "directional_reparam": True}, "one or the other"),
    ],
)
def test_contradictions_are_told(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        layer_of(**arguments)


def test_bad_calls_are_told():
    with pytest.raises(ValueError, match="must have 8 channels"):
        layer_of()(torch.randn(1, 4, 7))
    with pytest.raises(ValueError, match="must have 8 channels"):
        SimVQ(8, 4)(torch.randn(1, 4, 7))
    with pytest.raises(ValueError, match="indices must be shaped"):
        layer_of()(torch.randn(1, 4, 8), indices=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="ema_update_weight must have shape"):
        layer_of()(torch.randn(1, 4, 8), ema_update_weight=torch.ones(3))
    with pytest.raises(ValueError, match="dim must be a multiple of groups"):
        GroupedResidualVQ(dim=8, groups=3, num_quantizers=2, codebook_size=4)
    with pytest.raises(ValueError, match="codebook_size must name 3 sizes"):
        ResidualVQ(dim=8, num_quantizers=3, codebook_size=(4, 5))


def test_cross_entropy_has_no_second_derivative_to_give_wrongly():
    layer = layer_of()
    x = torch.randn(1, 6, 8, requires_grad=True)
    loss = layer(x, indices=torch.zeros(1, 6, dtype=torch.int64))[1]
    (gradient,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("arguments", [{}, {"threshold_ema_dead_code": 2}, {"stochastic_sample_codes": True}])
def test_the_same_bits_for_one_and_two_threads(arguments, threads):
    states = []
    for number in (1, 2):
        threads(number)
        layer = layer_of(**arguments)
        torch.manual_seed(3)
        x = torch.randn(3, 700, 8, requires_grad=True)
        quantized, indices, loss = layer(x)
        (quantized.square().sum() + loss).backward()
        states.append([quantized, indices, loss, x.grad, *layer.state_dict().values()])
    assert all(one.equal(other) for one, other in zip(*states, strict=True))


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator gives back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize(
    ("arguments", "given", "most"),
    [
        ({}, False, 4096 * 4),
        ({"use_cosine_sim": True, "threshold_ema_dead_code": 2}, False, 4096 * 4),
        ({"learnable_codebook": True, "ema_update": False, "orthogonal_reg_weight": 1.0}, False, 4096 * 4),
        ({"stochastic_sample_codes": True}, False, 1 << 22),
        ({"learnable_codebook": True, "ema_update": False}, True, 1 << 22),
    ],
)
def test_nothing_of_size_rows_times_codes(arguments, given, most):
    layer = layer_of(dim=4, codebook_size=4096, **arguments)
    x = torch.randn(1, 4096, 4, requires_grad=True)
    with _Largest() as largest:
        if given:
            layer(x, indices=torch.zeros(1, 4096, dtype=torch.int64))[1].backward()
        else:
            quantized, _, loss = layer(x)
            (quantized.sum() + loss).backward()
    assert 4096 * 4 <= largest.elements <= most < 4096 * 4096
