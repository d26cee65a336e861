"""PixelCNN: causality of both stacks at every position, no blind spot, conditioning, sampling."""

import copy
import pickle

import pytest
import torch

from vqkernels.models import PixelCNN

HEIGHT, WIDTH = 5, 6  # not square


def small(**options) -> PixelCNN:
    torch.manual_seed(0)
    return PixelCNN(7, **{"hidden_channels": 8, "num_layers": 6, "head_channels": 16, **options})


def seen_from(model: PixelCNN, stack: int, row: int, column: int, height: int = HEIGHT, width: int = WIDTH):
    """(H, W) bool: which positions of the embedded codes the features of a stack at (row, column) depend on."""
    embedded = torch.randn(1, 8, height, width, requires_grad=True)
    features = model.stacks(embedded)[stack]
    (gradient,) = torch.autograd.grad(features[0, :, row, column].square().sum(), embedded)
    return (gradient[0] != 0).any(0)


@pytest.mark.parametrize("row", range(HEIGHT))
@pytest.mark.parametrize("column", range(WIDTH))
def test_the_stacks_see_exactly_the_past(row, column):
    """Vertical: every row above. Horizontal: those and everything to the left. Nothing else, and no blind spot."""
    model = small()
    above = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    above[:row] = True
    past = above.clone()
    past[row, :column] = True
    assert torch.equal(seen_from(model, 0, row, column), above)
    assert torch.equal(seen_from(model, 1, row, column), past)


@pytest.mark.parametrize("first_kernel_size,kernel_size", [(3, 3), (5, 3), (7, 5)])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_receptive_field_grows_by_the_kernels(first_kernel_size, kernel_size, num_layers):
    """At the middle of a large grid: a triangle-free rectangle above, `reach` wide to either side."""
    model = small(num_layers=num_layers, first_kernel_size=first_kernel_size, kernel_size=kernel_size)
    reach = first_kernel_size // 2 + (num_layers - 1) * (kernel_size // 2)
    middle, side = 12, 25
    above = torch.zeros(side, side, dtype=torch.bool)
    above[middle - reach : middle, middle - reach : middle + reach + 1] = True
    past = above.clone()
    past[middle, middle - reach : middle] = True
    assert torch.equal(seen_from(model, 0, middle, middle, side, side), above)
    assert torch.equal(seen_from(model, 1, middle, middle, side, side), past)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 9), (2, 9, 1), (3, 4, 7)])
def test_logits_of_any_grid(shape):
    codes = torch.randint(7, shape)
    logits = small()(codes)
    assert logits.shape == (shape[0], 7, *shape[1:])
    assert logits.isfinite().all()


def test_a_changed_code_changes_only_later_logits():
    model = small().double().eval()
    codes = torch.randint(7, (1, HEIGHT, WIDTH))
    before = model(codes)
    changed = codes.clone()
    changed[0, 2, 3] = (changed[0, 2, 3] + 1) % 7
    moved = (model(changed) != before).any(1)[0].flatten()
    position = 2 * WIDTH + 3
    assert not moved[: position + 1].any()
    assert moved[position + 1]


def test_weights_are_not_written_in_forward():
    model = small()
    versions = [p._version for p in model.parameters()]
    model(torch.randint(7, (2, 4, 4)))
    assert [p._version for p in model.parameters()] == versions


def test_labels_condition_both_stacks_of_every_layer():
    model = small(num_classes=3)
    codes = torch.randint(7, (1, 4, 4)).expand(3, 4, 4)
    logits = model(codes, torch.arange(3))
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[2])
    logits.square().sum().backward()
    for layer in model.layers[:-1]:
        assert layer.class_bias.weight.grad.any(1).all()


def test_labels_are_dropped_in_training_alone_and_as_often_as_asked():
    """A grid without its label has the logits of label -1."""
    model = small(num_classes=2, label_dropout=0.25).double()
    codes, labels = torch.randint(7, (1, 2, 2)).expand(400, 2, 2), torch.ones(400, dtype=torch.int64)
    without = model.eval()(codes[:1], torch.tensor([-1]))
    assert not (model(codes, labels) == without).all((1, 2, 3)).any()
    dropped = torch.isclose(model.train()(codes, labels), without, rtol=0, atol=1e-12).all((1, 2, 3))
    assert 60 < int(dropped.sum()) < 140
    with pytest.raises(ValueError, match="label_dropout must be at least 0 and less than 1, but is 1.0"):
        small(num_classes=2, label_dropout=1.0)
    with pytest.raises(ValueError, match="label_dropout needs labels, but num_classes is None"):
        small(label_dropout=0.1)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 1\], but one is -1"):
        small(num_classes=2)(codes[:1], torch.tensor([-1]))


def test_a_condition_reaches_its_own_position_and_no_row_above():
    """It is known beforehand, so that the vertical stack may carry it to the left, too."""
    model = small(condition_channels=3).double()
    codes, condition = torch.randint(7, (1, HEIGHT, WIDTH)), torch.randn(1, 3, HEIGHT, WIDTH, dtype=torch.float64)
    changed = condition.clone()
    changed[0, :, 2, 3] += 1
    moved = (model(codes, condition=changed) != model(codes, condition=condition)).any(1)[0].flatten()
    assert not moved[: 2 * WIDTH].any() and moved[2 * WIDTH + 3] and moved[3 * WIDTH :].any()


def test_bits_per_code_is_the_cross_entropy_in_bits():
    model, codes = small().double(), torch.randint(7, (3, 4, 5))
    with torch.no_grad():
        for parameter in model.head[3].parameters():
            parameter.zero_()
    expected = torch.full((3,), 7.0, dtype=torch.float64).log2()  # uniform over 7 codes
    torch.testing.assert_close(model.bits_per_code(codes).detach(), expected)
    assert model.bits_per_code(codes).requires_grad


@pytest.mark.slow
def test_one_graph_for_any_grid():
    """Traced whole; the second size recompiles with free sizes, the third not at all."""
    model = small(num_classes=2, condition_channels=1).eval()
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: graphs.append(1) or graph)
    for batch, height, width in ((2, 4, 5), (3, 6, 7), (4, 5, 9)):
        codes, labels = torch.randint(7, (batch, height, width)), torch.arange(batch) % 2
        condition = torch.randn(batch, 1, height, width)
        torch.testing.assert_close(compiled(codes, labels, condition), model(codes, labels, condition))
    assert len(graphs) <= 2


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="labels are needed: this prior is conditional on 3 classes"):
        small(num_classes=3)(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels are not expected"):
        small().sample((1, 2, 2), labels=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be \(2,\)"):
        small(num_classes=3).sample((2, 2, 2), labels=torch.zeros(1, dtype=torch.int64))
    conditional = small(num_classes=3)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\], but one is 3"):
        conditional.sample((2, 2, 2), labels=torch.tensor([0, 3]))
    assert conditional.training, "a mistake leaves the model in eval mode"
    with pytest.raises(ValueError, match=r"codes must be \(B, H, W\)"):
        small()(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="kernel_size must be odd and at least 3, but is 4"):
        small(kernel_size=4)
    for option, value in (("temperature", 0.0), ("top_k", 0), ("top_p", 1.5)):
        with pytest.raises(ValueError, match=option):
            small().sample((1, 2, 2), **{option: value})


def test_sampling_is_ancestral():
    """With top_k=1 every code is the most likely one given those before it."""
    model = small(num_classes=3).double()
    labels = torch.tensor([0, 1, 2])
    codes = model.sample((3, 4, 5), labels=labels, top_k=1)
    assert codes.shape == (3, 4, 5) and codes.dtype == torch.int64
    assert torch.equal(model(codes, labels).argmax(1), codes)


def test_sampling_follows_the_model_and_its_options():
    model = small(num_layers=1).double()
    probabilities = torch.softmax(model(torch.zeros(1, 1, 1, dtype=torch.int64))[0, :, 0, 0].detach() * 8, dim=0)
    draws = 20000

    def histogram(**options):
        generator = torch.Generator().manual_seed(1)
        codes = model.sample((draws, 1, 1), temperature=1 / 8, generator=generator, **options)
        return torch.bincount(codes.flatten(), minlength=7) / draws

    assert (histogram() - probabilities).abs().max() < 0.015
    ranked = probabilities.argsort(descending=True)
    kept = torch.zeros_like(probabilities).index_copy(0, ranked[:3], probabilities[ranked[:3]])
    assert (histogram(top_k=3) - kept / kept.sum()).abs().max() < 0.015
    mass = probabilities[ranked].cumsum(0)
    nucleus = float(mass[1] + mass[2]) / 2  # two codes fall short of it, three reach it
    assert (histogram(top_p=nucleus) - kept / kept.sum()).abs().max() < 0.015


def test_sampling_repeats_under_a_seed_and_keeps_the_mode():
    model = small(dropout=0.5).train()
    draws = [model.sample((4, 3, 3), generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws) and model.training
    assert not torch.equal(draws[0], model.sample((4, 3, 3), generator=torch.Generator().manual_seed(6)))


def test_deepcopy_and_pickle():
    model, codes = small(num_classes=2), torch.randint(7, (2, 4, 4))
    labels = torch.tensor([0, 1])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(codes, labels), model(codes, labels))


def test_learns_a_deterministic_sequence():
    """Codes that count along the raster are predicted perfectly after a few steps: position by position context."""
    torch.manual_seed(0)
    model = small()
    start = torch.randint(7, (64, 1, 1))
    codes = (start + torch.arange(12).reshape(1, 3, 4)) % 7
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = torch.nn.functional.cross_entropy(model(codes).flatten(2)[..., 1:], codes.flatten(1)[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(codes).argmax(1) == codes).flatten(1)[:, 1:].float().mean() > 0.99
