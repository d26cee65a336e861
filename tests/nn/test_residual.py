"""The residual and grouped layers against plain PyTorch in every layout, and what training does to their codebooks."""

import itertools

import pytest
import torch
from nn.combinations import BETA, CODES, DECAY, DIM, GRADIENTS, LAYOUTS, METRICS, compare, rotated, rows_that_count

from vqkernels import reference
from vqkernels.nn import GroupedResidualVectorQuantizer, ResidualVectorQuantizer

LEVELS = 3
MASKS = ("none", "mask", "lengths", "levels")
COMBINATIONS = [
    c
    for c in itertools.product(LAYOUTS, (1, 2), (False, True), (False, True), MASKS, (None, DECAY), GRADIENTS, METRICS)
    if not (c[0] == "rows" and c[4] == "lengths")  # lengths need a batch and positions
]


def plain(layer, z, passed, gradient):
    """Quantized, indices, losses of channels-last z (N, DIM), one row and one level at a time; counts and sums."""
    project_in, project_out = layer.project_in or (lambda x: x), layer.project_out or (lambda x: x)
    books = layer.codebook.unsqueeze(-3).expand(-1, LEVELS, -1, -1) if layer.shared_codebook and layer.groups > 1 else (
        layer.codebook.expand(LEVELS, -1, -1) if layer.shared_codebook else layer.codebook
    )  # fmt: skip
    books = books if layer.groups > 1 else books.unsqueeze(0)
    n = torch.zeros(layer.groups, LEVELS, CODES, dtype=torch.float64)
    m = torch.zeros(books.shape, dtype=torch.float64)
    errors = [[[] for _ in range(LEVELS)] for _ in range(layer.groups)]
    outputs, indices = [], []
    for row, levels in zip(z, passed.tolist(), strict=True):
        index = torch.full((layer.groups, LEVELS), -1)
        if levels == 0:
            outputs.append(torch.zeros(DIM, dtype=torch.float64))
            indices.append(index)
            continue
        parts = []
        for group, x in enumerate(project_in(row).view(layer.groups, -1)):
            rest, total = x, 0.0
            for q in range(levels):
                book = books[group, q]
                score = (rest - book).square().sum(1)
                if layer.metric != "euclidean":
                    score = -(book @ rest) / (book.norm(dim=1) if layer.metric == "cosine" else 1)
                k = int(score.argmin())
                commitment = BETA * (rest - book[k].detach()).square()
                codebook = 0.0 if layer.ema_decay is not None else (rest.detach() - book[k]).square()
                errors[group][q].append(commitment + codebook)
                n[group, q, k] += 1
                m[group, q, k] += rest.detach()
                index[group, q], total, rest = k, total + book[k].detach(), rest - book[k].detach()
            parts.append(rotated(x, total) if gradient == "rotation" else x + (total - x).detach())
        outputs.append(project_out(torch.cat(parts)))
        indices.append(index)
    none = torch.zeros((), dtype=torch.float64)
    losses = torch.stack([torch.stack([torch.stack(e).mean() if e else none for e in group]) for group in errors])
    return torch.stack(outputs), torch.stack(indices), losses, n, m


MATRIX = [
    pytest.param(layout, metric, marks=() if (layout, metric) == ("image", "euclidean") else pytest.mark.slow)
    for layout, metric in itertools.product(LAYOUTS, METRICS)
]


@pytest.mark.parametrize("layout,metric", MATRIX)
def test_every_combination_is_the_plain_computation(layout, metric):
    combinations = [c for c in COMBINATIONS if c[0] == layout and c[-1] == metric]
    assert len(combinations) == 32 * (3 if layout == "rows" else 4)
    for number, combination in enumerate(combinations):
        check(number, *combination)


def check(seed, layout, groups, shared, projects, masked, ema_decay, gradient, metric):
    torch.manual_seed(seed)
    shape, channel_dim = LAYOUTS[layout]
    layer = ResidualVectorQuantizer(
        DIM,
        CODES,
        LEVELS,
        codebook_dim=4 if projects else None,
        groups=groups,
        shared_codebook=shared,
        beta=BETA,
        ema_decay=ema_decay,
        metric=metric,
        gradient=gradient,
        channel_dim=channel_dim,
    ).double()
    layer.codebook.data.normal_()
    z = torch.randn(shape, dtype=torch.float64)
    row_shape = z.select(channel_dim, 0).shape
    mask, arguments = rows_that_count(masked, row_shape)
    passed = torch.where(mask, LEVELS, 0)
    if masked == "levels":
        arguments["levels"] = torch.randint(1, LEVELS + 1, row_shape[:1])
        passed = arguments["levels"].view(-1, *[1] * (len(row_shape) - 1)).expand(row_shape)
    found = []

    def computed(rows):
        outputs, indices, losses, *state = plain(layer, rows, passed.reshape(-1), gradient)
        found.extend(state)
        return (outputs, indices, losses) if groups > 1 else (outputs, indices.squeeze(1), losses.squeeze(0))

    compare(layer, z, passed > 0, arguments, computed)
    n, m = (x.sum(1) for x in found) if shared else found
    n, m = n.view(layer.counts.shape), m.view(layer.codebook.shape)
    assert layer.counts.equal(n.long())
    if ema_decay is not None:
        used = (n > 0).unsqueeze(-1).expand_as(m)
        torch.testing.assert_close(layer.codebook[used], (m / n.unsqueeze(-1))[used], rtol=1e-9, atol=1e-11)


KINDS = {
    "plain": (ResidualVectorQuantizer, dict(levels=3)),
    "shared": (ResidualVectorQuantizer, dict(levels=3, shared_codebook=True)),
    "grouped": (GroupedResidualVectorQuantizer, dict(levels=3, groups=2)),
    "grouped, shared": (GroupedResidualVectorQuantizer, dict(levels=3, groups=2, shared_codebook=True)),
}


def build(kind, dim=8, size=32, **options):
    layer, sizes = KINDS[kind]
    return layer(dim, size, **sizes, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_collapsed_stack_comes_back(kind, backend):
    layer = build(kind, ema_decay=0.9, revive="rows", backend=backend)
    layer.codebook.fill_(50.0)
    for _ in range(60):
        layer(torch.randn(256, 8))
    assert (layer.counts > 0).float().mean() > 0.85 and layer.perplexity.min() > 14


@pytest.mark.parametrize("kind", KINDS)
def test_a_revived_code_is_what_is_left_of_a_row_at_its_level(kind, backend):
    layer = build(kind, ema_decay=0.9, revive="rows", backend=backend)
    layer.codebook.mul_(20)
    layer.codebook[..., 16:, :] = 90.0  # half of the codes can never be chosen
    z = torch.randn(300, 8)
    stack = layer.codebook.clone()
    layer(z)
    books = stack if layer.groups > 1 else stack.unsqueeze(0)
    found = layer.codebook if layer.groups > 1 else layer.codebook.unsqueeze(0)
    for group, rows in enumerate(z.view(300, layer.groups, -1).unbind(1)):
        levels = books[group] if not layer.shared_codebook else books[group].expand(3, -1, -1)
        rests = [rows]
        for codes in levels[:-1]:
            rests.append(rests[-1] - codes[reference.nearest(rests[-1], codes)])
        for q in range(1 if layer.shared_codebook else 3):
            revived = found[group][16:] if layer.shared_codebook else found[group, q, 16:]
            allowed = torch.cat(rests) if layer.shared_codebook else rests[q]
            assert (revived[:, None] == allowed).all(-1).any(1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_k_means_starts_every_level_on_what_is_left(kind, ema_decay, backend):
    torch.manual_seed(1)
    z = torch.randn(600, 8)
    layer = build(kind, init="kmeans", ema_decay=ema_decay, backend=backend)
    losses = layer(z)[2].detach().view(-1, 3)
    assert layer.initialised and layer.perplexity.min() > 10
    assert (losses[:, 1:] < losses[:, :-1]).all()  # every level leaves less than the one before it
    uniform = build(kind, ema_decay=ema_decay, backend=backend).eval()
    left = z - layer.eval()(z)[0]
    assert left.square().mean() < 0.5 * (z - uniform(z)[0]).square().mean()


def test_k_means_with_fewer_rows_than_codes_says_so():
    layer = build("plain", init="kmeans", ema_decay=0.9)
    with pytest.warns(RuntimeWarning, match="k-means initialisation of 32 codes found 5 different usable rows"):
        layer(torch.randn(5, 8))
    assert layer.codebook.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_row_leaves_every_codebook_alone(kind, backend):
    layers = [build(kind, ema_decay=0.9, backend=backend) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    z = torch.randn(100, 8)
    poisoned = torch.cat([z, torch.full((1, 8), torch.nan), torch.full((1, 8), torch.inf)])
    _, _, loss = layers[0](poisoned)
    assert loss.isnan().all()
    layers[1](z)
    for name in ("counts", "ema_sums", "codebook"):
        assert getattr(layers[0], name).equal(getattr(layers[1], name)), name
    revived = build(kind, ema_decay=0.9, revive="rows", backend=backend)
    for _ in range(20):
        revived(poisoned)
    assert revived.codebook.isfinite().all() and revived.ema_sums.isfinite().all()


def test_dropout_draws_levels_for_each_element_and_all_of_them_without():
    layer = ResidualVectorQuantizer(4, 8, 4, dropout=0.5, ema_decay=0.9, seed=0)
    z = torch.randn(4000, 3, 4)
    _, indices, _ = layer(z)
    passed = (indices >= 0).sum(-1)
    assert passed.eq(passed[:, :1]).all()  # one draw per element, for all of its positions
    share = torch.bincount(passed[:, 0], minlength=5) / 4000
    torch.testing.assert_close(share, torch.tensor([0, 0.125, 0.125, 0.125, 0.625]), atol=0.03, rtol=0)
    again = layer(z)[1]
    assert not (again >= 0).equal(indices >= 0) and layer.dropout_steps == 2
    assert (layer.eval()(z)[1] >= 0).all()
    twin = ResidualVectorQuantizer(4, 8, 4, dropout=0.5, ema_decay=0.9, seed=0)
    assert (twin(z)[1] >= 0).equal(indices >= 0)
    assert not (ResidualVectorQuantizer(4, 8, 4, dropout=0.5, seed=1)(z)[1] >= 0).equal(indices >= 0)
    assert (ResidualVectorQuantizer(4, 8, 4, dropout=1.0)(z)[1][:, 0, 3] < 0).float().mean() > 0.6


def test_fewer_levels_in_encoding_and_decoding():
    layer = ResidualVectorQuantizer(8, 32, 5, init="kmeans", ema_decay=0.9)
    z = torch.randn(300, 8)
    layer(z)
    layer.eval()
    full = layer(z)[1]
    errors = []
    for n in range(1, 6):
        quantized, indices, losses = layer(z, levels=n)
        assert indices[:, :n].equal(full[:, :n]) and indices[:, n:].eq(-1).all() and losses[n:].eq(0).all()
        assert layer.decode(full[:, :n]).equal(quantized) and layer.decode(indices).equal(quantized)
        errors.append(float((z - quantized).square().mean()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_manual_updates_are_one_update_of_the_joined_batch(kind, backend):
    one = build(kind, ema_decay=0.9, backend=backend)
    parts = build(kind, ema_decay=0.9, ema_update="manual", backend=backend)
    parts.load_state_dict(one.state_dict())
    z = torch.randn(120, 8)
    for part in z.split(40):
        parts(part)
    parts.update_codebook()
    one(z)
    torch.testing.assert_close(parts.codebook, one.codebook)
    assert parts.counts.equal(one.counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_cast_modules_search_the_stored_values(dtype, backend):
    layer = build("plain", ema_decay=0.9, codebook_dim=5, revive="rows", backend=backend).to(dtype)
    assert layer.codebook.dtype == layer.ema_sums.dtype == torch.float32
    z, codes = torch.randn(80, 8, dtype=dtype), layer.codebook.clone()
    rows = layer.project_in(z)
    quantized, indices, losses = layer(z)
    assert indices.equal(reference.residual_vector_quantize(rows, codes)[1])
    assert quantized.dtype == dtype and losses.dtype == torch.float32
    plain_layer = build("plain", ema_decay=0.9, backend=backend)
    x = torch.randn(50, 8)
    expected = plain_layer.eval()(x)
    with torch.autocast("cpu", dtype):
        assert all(a.equal(b) for a, b in zip(plain_layer(x), expected, strict=True))


def test_freeze_leaves_everything_alone():
    layer = build("plain", ema_decay=0.9)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(torch.randn(40, 8), freeze=True)
    assert all(layer.state_dict()[key].equal(value) for key, value in state.items())
    gradient = build("plain")
    gradient(torch.randn(40, 8), freeze=True)[2].sum()
    out = gradient(torch.randn(40, 8, requires_grad=True), freeze=True)[2].sum()
    out.backward()
    assert gradient.codebook.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_go_on_to_the_same_bits_and_say_what_does_not_fit(kind, tmp_path, backend):
    safetensors = pytest.importorskip("safetensors.torch")
    options = dict(ema_decay=0.9, revive="rows", dropout=0.3, init="kmeans", backend=backend)
    straight, resumed = build(kind, **options), build(kind, **options)
    batches = [torch.randn(60, 8) for _ in range(4)]
    for z in batches[:2]:
        straight(z)
    safetensors.save_model(straight, str(tmp_path / "layer.safetensors"))
    resumed.load_state_dict(safetensors.load_file(str(tmp_path / "layer.safetensors")))
    for z in batches[2:]:
        assert all(a.equal(b) for a, b in zip(straight(z), resumed(z), strict=True))
    assert all(resumed.state_dict()[key].equal(value) for key, value in straight.state_dict().items())
    with pytest.raises(RuntimeError, match="codebook_size=32 where this layer has 16"):
        build(kind, size=16, **options).load_state_dict(straight.state_dict())


def test_a_checkpoint_of_another_kind_of_stack_says_so():
    state = build("shared").state_dict()
    with pytest.raises(RuntimeError, match="build it with the checkpoint's levels, groups and shared_codebook"):
        build("plain").load_state_dict(state)
    with pytest.raises(RuntimeError, match="levels=3 where this layer has 2"):
        ResidualVectorQuantizer(8, 32, 2).load_state_dict(build("plain").state_dict())


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(levels=0), "levels must be a positive int, got 0"),
        (dict(groups=3), "dim must be a multiple of groups=3"),
        (dict(dropout=1.5), r"dropout must be a fraction in \[0, 1\], got 1.5"),
        (dict(shared_codebook=1), "shared_codebook must be True or False, got 1"),
        (dict(ema_update="manual"), "needs ema_decay"),
    ],
)
def test_bad_arguments_are_one_clear_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResidualVectorQuantizer(**(dict(dim=8, codebook_size=4, levels=2) | arguments))


def test_one_group_has_no_axis_of_its_own():
    indices, losses = GroupedResidualVectorQuantizer(8, 4, 3, 1)(torch.randn(5, 8))[1:]
    assert indices.shape == (5, 3) and losses.shape == (3,)


def test_bad_calls_are_one_clear_sentence():
    layer = GroupedResidualVectorQuantizer(8, 4, 3, 2)
    z = torch.randn(5, 8)
    for levels, error, message in (
        (4, ValueError, "levels must be an int from 1 to 3, got 4"),
        (True, ValueError, "levels must be an int from 1 to 3, got True"),
        (torch.ones(5), TypeError, "levels must be an int or an int64 tensor, got torch.float32"),
        (torch.ones(4, dtype=torch.int64), ValueError, r"levels must be \(5,\), one per element, got \[4\]"),
    ):
        with pytest.raises(error, match=message):
            layer(z, levels=levels)
    with pytest.raises(ValueError, match=r"indices must have 1 to 3 levels on the last axis, got \[5, 2, 4\]"):
        layer.decode(torch.zeros(5, 2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"2 groups on the last axis but one, got \[5, 3\]"):
        layer.decode(torch.zeros(5, 3, dtype=torch.int64))
    with pytest.raises(IndexError, match=r"indices must be in \[-1, 3\], got 4"):
        layer.decode(torch.full((5, 2, 3), 4))
