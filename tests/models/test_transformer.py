"""TransformerPrior: what each position sees, where it is, conditioning, learning, one graph, and mistakes."""

import copy
import pickle

import pytest
import torch

from vqkernels.models import TransformerPrior

HEIGHT, WIDTH = 3, 5  # not square


def small(**options) -> TransformerPrior:
    """Small, in float64, with logits that are far from uniform."""
    torch.manual_seed(0)
    model = TransformerPrior(7, **{"hidden_channels": 8, "num_layers": 3, "num_heads": 2, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 or parameter is model.start:
                parameter.normal_(std=0.5)
    return model


def tokens_seen(model: TransformerPrior, position: int) -> torch.Tensor:
    """(N,) bool: which tokens, 0 being the start, the logits at a position depend on."""
    codes = torch.randint(7, (1, HEIGHT, WIDTH))
    tokens = torch.cat([model.start_token(None, 1), model.embedding(codes.flatten(1))], 1).detach()
    tokens.requires_grad_()
    features = tokens[:, :-1] + model.positions(HEIGHT, WIDTH)
    for layer in model.layers:
        features = layer(features)
    logits = model.head(model.norm(features))
    (gradient,) = torch.autograd.grad(logits[0, position].square().sum(), tokens)
    return (gradient[0] != 0).any(1)


@pytest.mark.parametrize("position", range(HEIGHT * WIDTH))
def test_logits_see_exactly_the_codes_before_them(position):
    """Token i carries the code at i - 1: the start and all earlier codes are seen, the code itself is not."""
    expected = torch.arange(HEIGHT * WIDTH + 1) <= position
    assert torch.equal(tokens_seen(small(), position), expected)


@pytest.mark.parametrize("position", range(HEIGHT * WIDTH))
def test_a_changed_code_changes_every_later_logit_and_no_other(position):
    model = small().eval()
    codes = torch.randint(7, (1, HEIGHT * WIDTH))
    changed = codes.clone()
    changed[0, position] = (changed[0, position] + 1) % 7
    before, after = (model(c.view(1, HEIGHT, WIDTH)) for c in (codes, changed))
    moved = (before != after).any(1).flatten()
    assert torch.equal(moved, torch.arange(HEIGHT * WIDTH) > position)


@pytest.mark.parametrize("row", range(HEIGHT))
@pytest.mark.parametrize("column", range(WIDTH))
def test_a_position_is_its_row_and_its_column(row, column):
    """The logits at (row, column) depend on the embeddings of the rows and columns of the raster up to there."""
    model = small(max_grid=(HEIGHT + 1, WIDTH + 2))
    assert torch.equal(
        model.positions(HEIGHT, WIDTH)[row * WIDTH + column], model.row_embedding[row] + model.column_embedding[column]
    )
    model(torch.randint(7, (2, HEIGHT, WIDTH)))[:, :, row, column].square().sum().backward()
    rows, columns = (e.grad.ne(0).any(1) for e in (model.row_embedding, model.column_embedding))
    assert torch.equal(rows, torch.arange(HEIGHT + 1) <= row)
    assert torch.equal(columns, torch.arange(WIDTH + 2) <= (column if row == 0 else WIDTH - 1))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 9), (2, 9, 1), (3, 4, 7), (0, 2, 2), (2, 0, 3)])
def test_logits_of_any_grid(shape):
    logits = small()(torch.randint(7, shape))
    assert logits.shape == (shape[0], 7, *shape[1:])
    assert logits.isfinite().all()


def test_one_model_serves_grids_of_several_shapes():
    """The first row of a higher grid has the logits that it has alone: its positions are the same."""
    model, codes = small(), torch.randint(7, (2, 4, 5))
    torch.testing.assert_close(model(codes)[:, :, :1], model(codes[:, :1]), rtol=0, atol=1e-12)


def test_the_label_reaches_every_position():
    model = small(num_classes=3)
    codes = torch.randint(7, (1, 4, 4)).expand(3, 4, 4)
    logits = model(codes, torch.arange(3))
    assert (logits[0] != logits[1]).any(0).all() and (logits[1] != logits[2]).any(0).all()
    logits.square().sum().backward()
    assert model.class_embedding.weight.grad.any(1).all()


def test_labels_are_dropped_in_training_alone_and_as_often_as_asked():
    """A grid without its label has the logits of label -1."""
    model = small(num_classes=2, label_dropout=0.25)
    codes, labels = torch.randint(7, (1, 2, 2)).expand(400, 2, 2), torch.ones(400, dtype=torch.int64)
    without = model.eval()(codes[:1], torch.tensor([-1]))
    assert not (model(codes, labels) == without).all((1, 2, 3)).any()
    dropped = torch.isclose(model.train()(codes, labels), without, rtol=0, atol=1e-12).all((1, 2, 3))
    assert 60 < int(dropped.sum()) < 140


def test_no_label_is_the_start_alone():
    model = small(num_classes=2, label_dropout=0.1).eval()
    start = model.start_token(torch.tensor([-1, 1]), 2)[:, 0]
    assert torch.equal(start[0], model.start) and torch.equal(start[1], model.start + model.class_embedding.weight[1])


def test_dropout_is_for_training_alone():
    model, codes = small(dropout=0.5), torch.randint(7, (2, 3, 3))
    assert not torch.equal(model(codes), model(codes))
    assert torch.equal(model.eval()(codes), model(codes))


def test_bits_per_code_is_the_cross_entropy_in_bits():
    model, codes = small(), torch.randint(7, (3, 4, 5))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
    expected = torch.full((3,), 7.0, dtype=torch.float64).log2()  # uniform over 7 codes
    torch.testing.assert_close(model.bits_per_code(codes).detach(), expected)
    assert model.bits_per_code(codes).requires_grad


def test_a_new_model_is_nearly_uniform():
    """The logits of an untrained model tell the codes apart by little: its first loss is log K."""
    model, codes = TransformerPrior(64, hidden_channels=32, num_layers=8), torch.randint(64, (4, 6, 6))
    assert (model.bits_per_code(codes).detach() - 6).abs().max() < 0.05


@pytest.mark.slow
def test_one_graph_for_any_grid():
    """Traced whole, with gradients; the second size recompiles with free sizes, the third not at all."""
    model = small(num_classes=2)
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: graphs.append(1) or graph)
    for batch, height, width in ((2, 4, 5), (3, 6, 7), (4, 5, 9)):
        codes, labels = torch.randint(7, (batch, height, width)), torch.arange(batch) % 2
        torch.testing.assert_close(compiled(codes, labels), model(codes, labels))
    assert len(graphs) <= 2


def test_compiled_gradients_are_those_of_eager():
    model = small(num_layers=2, num_classes=2)
    codes, labels = torch.randint(7, (2, 3, 4)), torch.arange(2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        torch.nn.functional.cross_entropy(forward(codes, labels), codes).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager, rtol=0, atol=1e-12)


def test_mistakes_are_named():
    codes = torch.zeros(1, 2, 2, dtype=torch.int64)
    for options, sentence in [
        ({"num_layers": 0}, "num_layers must be at least 1, but is 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, but is 0"),
        ({"num_heads": 3}, "hidden_channels must be a multiple of num_heads, 3, but is 8"),
        ({"max_grid": (4, 0)}, r"max_grid must be a height and a width of at least 1, but is \(4, 0\)"),
        ({"label_dropout": 0.1}, "label_dropout needs labels, but num_classes is None"),
        ({"num_classes": 2, "label_dropout": 1.0}, "label_dropout must be at least 0 and less than 1, but is 1.0"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            small(**options)
    with pytest.raises(ValueError, match="labels are needed: this prior is conditional on 3 classes"):
        small(num_classes=3)(codes)
    with pytest.raises(ValueError, match="labels are not expected"):
        small()(codes, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 1\], but one is -1"):
        small(num_classes=2)(codes, torch.tensor([-1]))
    with pytest.raises(ValueError, match=r"codes must be \(B, H, W\)"):
        small()(codes[0])
    model = small(max_grid=(4, 2))
    with pytest.raises(ValueError, match="a grid must be at most 4 x 2, max_grid, but is 2 x 4"):
        model(torch.zeros(1, 2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="a grid must be at most 4 x 2, max_grid, but is 5 x 2"):
        model.sample((1, 5, 2))
    assert model.training, "a mistake leaves the model in eval mode"


def test_deepcopy_and_pickle():
    model, codes = small(num_classes=2), torch.randint(7, (2, 4, 4))
    labels = torch.tensor([0, 1])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(codes, labels), model(codes, labels))


def test_learns_a_deterministic_pattern():
    """Every code is the one above it plus the label: the model must find its label, its row and its column."""
    torch.manual_seed(0)
    model = TransformerPrior(7, hidden_channels=32, num_layers=2, num_heads=2, num_classes=3, max_grid=(3, 4))
    labels = torch.arange(96) % 3
    codes = (torch.randint(7, (96, 1, 4)) + labels[:, None, None] * torch.arange(3)[:, None]) % 7
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        loss = torch.nn.functional.cross_entropy(model(codes, labels)[:, :, 1:], codes[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(codes, labels).argmax(1) == codes)[:, 1:].float().mean() > 0.99
    drawn = model.sample((30, 3, 4), labels=labels[:30], generator=torch.Generator().manual_seed(0))
    follows = (drawn[:, 1:] - drawn[:, :-1] - labels[:30, None, None]) % 7 == 0
    assert follows.float().mean() > 0.97
