"""The fused layers of a PixelCNN against its plain layers: logits, the gradient of every parameter, what falls back."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from vqkernels.backends import registry
from vqkernels.models import PixelCNN, pixelcnn_training

OPTIONS = {
    "plain": {},
    "labels": {"num_classes": 3},
    "label_dropout": {"num_classes": 3, "label_dropout": 0.5},
    "condition": {"condition_channels": 2},
    "everything": {"num_classes": 3, "condition_channels": 2, "dropout": 0.3, "label_dropout": 0.3},
    "dropout": {"dropout": 0.4},
    "one_layer": {"num_layers": 1},
    "two_layers": {"num_layers": 2, "hidden_channels": 19},
    "no_activation": {"head_activation": False, "first_kernel_size": 5},
    "few_positions": {"num_codes": 500},
}


def model(dtype: torch.dtype = torch.float64, **options) -> PixelCNN:
    torch.manual_seed(0)
    sizes = {"num_codes": 9, "hidden_channels": 8, "num_layers": 4, "head_channels": 16}
    return PixelCNN(**{**sizes, **options}).to(dtype)


def inputs(made: PixelCNN, shape: tuple[int, int, int]):
    codes = torch.randint(made.num_codes, shape)
    labels = None if made.num_classes is None else torch.arange(shape[0]) % made.num_classes
    channels, dtype = made.condition_channels, made.embedding.weight.dtype
    return codes, labels, None if channels is None else torch.randn(shape[0], channels, *shape[1:], dtype=dtype)


def step(made: PixelCNN, given, weights: torch.Tensor | None = None, backend: str = "auto"):
    """Logits, and the gradients of all parameters by name, of a random functional of the logits."""
    made.zero_grad()
    torch.manual_seed(1)
    with registry.use_backend(backend):
        assert pixelcnn_training.serves(made, given[0], given[2]) == (backend == "auto")
        logits = made(*given)
    weights = torch.randn(logits.shape, dtype=logits.dtype) if weights is None else weights
    logits.backward(weights)
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in made.named_parameters()}
    return logits.detach(), grads, weights


def assert_equal_steps(found, expected, tolerance: float) -> None:
    assert found[1].keys() == expected[1].keys()
    for x, y in [(found[0], expected[0])] + [(found[1][name], expected[1][name]) for name in found[1]]:
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1.0, float(y.abs().max())))


@pytest.mark.parametrize("shape", [(3, 4, 7), (2, 1, 9), (1, 6, 3), (4, 3, 8)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_logits_and_gradients_equal_the_plain_layers(cpu_kernels, options, shape):
    made = model(**options)
    given = inputs(made, shape)
    found = step(made, given)
    assert_equal_steps(found, step(made, given, found[2], "eager"), 1e-12)
    made.eval()
    found = step(made, given)
    assert_equal_steps(found, step(made, given, found[2], "eager"), 1e-12)


@pytest.mark.parametrize("channels,shape", [(64, (3, 8, 8)), (32, (2, 16, 16))])
def test_fifteen_layers_in_float32_are_as_near_to_the_truth_as_the_plain_ones(cpu_kernels, channels, shape):
    made = model(torch.float32, hidden_channels=channels, num_layers=15, num_classes=3, num_codes=64)
    exact = model(hidden_channels=channels, num_layers=15, num_classes=3, num_codes=64)
    exact.load_state_dict(made.state_dict())
    given = inputs(made, shape)
    logits, grads, weights = step(made, given)
    plain_logits, plain_grads, _ = step(made, given, weights, "eager")
    true_logits, true_grads, _ = step(exact, given, weights.double(), "eager")

    def error(found, true):
        return float((found.double() - true).norm() / true.norm())

    assert error(logits, true_logits) <= 2 * error(plain_logits, true_logits) + 1e-7
    for name, true in true_grads.items():
        assert error(grads[name], true) <= 4 * error(plain_grads[name], true) + 1e-6, name


def test_the_loss_of_a_training_step_is_the_plain_one(cpu_kernels):
    """By the loss that training takes, on the view of rows that the fused layers return."""
    made = model(num_classes=3)
    codes, labels, _ = inputs(made, (4, 5, 6))
    losses = []
    for backend in ("auto", "eager"):
        with registry.use_backend(backend):
            losses.append(float(F.cross_entropy(made(codes, labels), codes).detach()))
    assert abs(losses[0] - losses[1]) < 1e-12


@pytest.mark.parametrize(
    "frozen", ["embedding", "layers.0", "layers.2", "vertical.weight", "class_bias", "head", "bias"]
)
def test_frozen_parameters_get_no_gradient_and_change_no_other(cpu_kernels, frozen):
    made = model(num_classes=3)
    given = inputs(made, (2, 4, 5))
    _, whole, weights = step(made, given)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(frozen not in name)
    _, some, _ = step(made, given, weights)
    for name, grad in some.items():
        assert (grad is None) == (frozen in name)
        assert grad is None or torch.equal(grad, whole[name])


def test_other_cases_are_left_to_the_plain_layers(cpu_kernels, monkeypatch):
    codes = torch.randint(9, (2, 4, 5))

    def served(made: PixelCNN, codes: torch.Tensor = codes, condition: torch.Tensor | None = None) -> bool:
        labels = None if made.num_classes is None else torch.zeros(len(codes), dtype=torch.int64)
        logits = made(codes, labels, condition)
        assert logits.shape == (codes.shape[0], 9, *codes.shape[1:])
        logits.float().sum().backward()
        return pixelcnn_training.serves(made, codes, condition)

    assert served(model()) and served(model(torch.float32)) and served(model(first_kernel_size=3))
    assert served(model(), codes.transpose(1, 2))
    assert not served(model(torch.bfloat16))
    assert not served(model(kernel_size=5))
    assert not served(model(), codes[:, :, :2])
    assert not served(model(), codes[:0])
    with torch.autocast("cpu", torch.bfloat16):
        assert not served(model(torch.float32))
    with registry.use_backend("eager"):
        assert not served(model())
    made, seen = model(), []
    handle = made.layers[1].vertical.register_forward_hook(lambda *_: seen.append(1))
    assert not served(made) and seen
    handle.remove()
    assert served(made)
    made.layers[2].output = nn.Sequential(made.layers[2].output)
    assert not served(made)


class Doubled(nn.Conv2d):
    """A convolution with an adapter, as it were."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def other_convolution(made: PixelCNN) -> None:
    made.layers[1].output = Doubled(8, 8, 1).double()


def other_method(made: PixelCNN) -> None:
    plain = made.layers[1].output.forward
    made.layers[1].output.forward = lambda x: 2 * plain(x)


def other_layer(made: PixelCNN) -> None:
    class Layer(type(made.layers[1])):
        def forward(self, *inputs):
            vertical, horizontal = super().forward(*inputs)
            return 2 * vertical, horizontal

    made.layers[1].__class__ = Layer


def other_stacks(made: PixelCNN) -> None:
    class Model(PixelCNN):
        def stacks(self, *inputs):
            vertical, horizontal = super().stacks(*inputs)
            return vertical, vertical + horizontal

    made.__class__ = Model


def other_embedding(made: PixelCNN) -> None:
    made.embedding = nn.Embedding(9, 8, max_norm=0.1).double()


def padded_embedding(made: PixelCNN) -> None:
    made.embedding = nn.Embedding(9, 8, padding_idx=0).double()


def other_dropout(made: PixelCNN) -> None:
    made.layers[1].dropout = nn.Identity()


def other_activation(made: PixelCNN) -> None:
    made.head[2] = nn.GELU()


def wider_head(made: PixelCNN) -> None:
    made.head[1] = nn.Conv2d(8, 16, 3, padding=1).double()


def head_without_bias(made: PixelCNN) -> None:
    made.head[3] = nn.Conv2d(16, 9, 1, bias=False).double()


@pytest.mark.parametrize(
    "change",
    [
        other_convolution, other_method, other_layer, other_stacks, other_embedding, padded_embedding, other_dropout,
        other_activation, wider_head, head_without_bias,
    ],
)  # fmt: skip
def test_a_part_of_another_kind_is_computed_as_it_says(cpu_kernels, change):
    made, codes = model(), torch.randint(9, (2, 4, 5))
    change(made)
    found = []
    for backend in ("auto", "eager"):
        made.zero_grad()
        with registry.use_backend(backend):
            logits = made(codes)
        logits.square().sum().backward()
        found.append((logits.detach(), made.embedding.weight.grad.clone()))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_hooks_on_all_modules_are_called(cpu_kernels):
    made, seen = model(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(type(module)))
    made(torch.randint(9, (2, 4, 5)))
    handle.remove()
    assert nn.Conv2d in seen


@pytest.mark.parametrize("num_codes", [9, 500])
def test_codes_of_int32_are_codes(cpu_kernels, num_codes):
    made, codes = model(num_codes=num_codes), torch.randint(9, (2, 4, 5))
    assert torch.equal(made(codes.int()), made(codes))


def test_functional_transforms_take_the_plain_layers(cpu_kernels):
    made, codes = model(), torch.randint(9, (2, 3, 4))
    parameters = dict(made.named_parameters())

    def loss(parameters, codes):
        logits = torch.func.functional_call(made, parameters, (codes[None],))
        return F.cross_entropy(logits, codes[None])

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, codes)
    F.cross_entropy(made(codes), codes).backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(grads[name].mean(0), parameter.grad, rtol=0, atol=1e-12)


def test_forward_differentiation_takes_the_plain_layers(cpu_kernels):
    made, codes = model(), torch.randint(9, (2, 3, 4))
    tangent = torch.randn(9, 8, dtype=torch.float64)
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(made.embedding.weight.detach(), tangent)
        logits = torch.func.functional_call(made, {"embedding.weight": weight}, (codes,))
        along = forward_ad.unpack_dual(logits.sum()).tangent
    made(codes).sum().backward()
    torch.testing.assert_close(along, (made.embedding.weight.grad * tangent).sum(), rtol=1e-10, atol=1e-12)


def test_an_exported_graph_holds_no_operator_of_its_own(cpu_kernels):
    made, codes = model().eval(), torch.randint(9, (2, 3, 4))
    graph = torch.export.export(made, (codes,))
    assert "vqkernels" not in str(graph.graph)
    torch.testing.assert_close(graph.module()(codes), made(codes), rtol=0, atol=1e-12)


def test_parametrized_weights_train(cpu_kernels):
    made = model()
    nn.utils.parametrizations.weight_norm(made.layers[1].vertical)
    given = inputs(made, (2, 4, 5))
    found = step(made, given)
    assert_equal_steps(found, step(made, given, found[2], "eager"), 1e-12)
    assert found[1]["layers.1.vertical.parametrizations.weight.original0"].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_repeats_bit_for_bit(cpu_kernels, dtype):
    made = model(dtype, num_classes=3, dropout=0.2, hidden_channels=24)
    given = inputs(made, (5, 6, 7))
    first = step(made, given)
    second = step(made, given, first[2])
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(grad, second[1][name]) for name, grad in first[1].items())


def test_a_second_derivative_is_refused(cpu_kernels):
    made, codes = model(), torch.randint(9, (2, 3, 4))
    (grad,) = torch.autograd.grad(made(codes).square().sum(), made.layers[1].output.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        grad.sum().backward()


def test_a_code_out_of_range_is_named(cpu_kernels):
    with pytest.raises(RuntimeError, match=r"codes must be in \[0, 8\], but one is 9"):
        model()(torch.full((2, 4, 5), 9))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_classes": 3, "condition_channels": 2}])
def test_compiles_whole_with_its_backward(cpu_kernels, options):
    torch._dynamo.reset()
    made = model(num_layers=2, **options)
    given = inputs(made, (3, 4, 5))
    expected = step(made, given)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    made.zero_grad()
    compiled(*given).backward(expected[2])
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[1][name], rtol=0, atol=1e-12)
