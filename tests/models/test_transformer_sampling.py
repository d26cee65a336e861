"""The transformer's cached sampler draws the codes of the plain one, for every option and shape."""

import math
import sys

import pytest
import torch

from vqkernels.models import TransformerPrior, transformer_sampling
from vqkernels.models.ancestral_sampling import Options
from vqkernels.models.transformer_sampling import CachedSampler

CODES = 23


def prior(*, dtype: torch.dtype = torch.float64, **options) -> TransformerPrior:
    """Small, with logits that are far from uniform."""
    torch.manual_seed(0)
    model = TransformerPrior(CODES, **{"hidden_channels": 12, "num_layers": 3, "num_heads": 3, **options}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 or parameter is model.start:
                parameter.normal_(std=0.4)
    return model


def labels_of(model: TransformerPrior, batch: int) -> torch.Tensor | None:
    return None if model.num_classes is None else torch.arange(batch) % model.num_classes


def draw(model: TransformerPrior, shape: tuple[int, int, int], **options) -> torch.Tensor:
    options.setdefault("labels", labels_of(model, shape[0]))
    return model.sample(shape, generator=torch.Generator().manual_seed(3), **options)


def assert_cached_is_plain(model: TransformerPrior, shape: tuple[int, int, int], **options) -> None:
    plain = draw(model, shape, cached=False, **options)
    assert plain.shape == shape and bool(((plain >= 0) & (plain < CODES)).all())
    assert torch.equal(draw(model, shape, **options), plain)


OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 5.0},
    "top_k": {"top_k": 3},
    "greedy": {"top_k": 1},
    "top_k above K": {"top_k": 1000},
    "top_p": {"top_p": 0.6},
    "all": {"temperature": 1.7, "top_k": 9, "top_p": 0.8},
}


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(options, guidance):
    model = prior(num_classes=3, label_dropout=0.1)
    assert_cached_is_plain(model, (3, 3, 5), guidance=guidance, **options)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 1, 1), (1, 7, 1), (1, 1, 7), (3, 2, 9), (3, 9, 2), (9, 3, 3), (0, 3, 3), (2, 0, 3)]
)
def test_every_shape(shape):
    assert_cached_is_plain(prior(), shape)
    assert_cached_is_plain(prior(num_classes=2), shape)


MODELS = {
    "one layer": {"num_layers": 1},
    "one head": {"num_heads": 1},
    "heads of one channel": {"num_heads": 12},
    "one channel": {"hidden_channels": 1, "num_heads": 1},
    "the smallest grid": {"max_grid": (3, 4)},
    "dropout": {"dropout": 0.9},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_every_model(options):
    assert_cached_is_plain(prior(**options), (2, 3, 4))


def test_guidance_is_the_formula():
    """0 is the prior without labels, 1 the prior with them; -1 asks for no label."""
    model = prior(num_classes=3, label_dropout=0.1)
    shape = (3, 4, 4)
    without = draw(model, shape, labels=torch.full((3,), -1))
    assert torch.equal(draw(model, shape, guidance=0.0), without)
    assert not torch.equal(draw(model, shape), without)
    assert not torch.equal(draw(model, shape, guidance=4.0), draw(model, shape))
    assert_cached_is_plain(model, shape, guidance=-0.5)


def test_labels_reach_the_samples():
    """A dropped label would draw the same grid from the same noise."""
    model = prior(num_classes=3)
    grids = [draw(model, (2, 4, 4), labels=torch.full((2,), label)) for label in range(3)]
    assert not torch.equal(grids[0], grids[1]) and not torch.equal(grids[1], grids[2])


@pytest.mark.parametrize("cached", [True, False])
def test_the_temperature_reaches_the_samples(cached):
    """Nearly 0 is greedy; large is uniform."""
    model = prior()
    greedy = draw(model, (4, 4, 5), top_k=1, cached=cached)
    assert torch.equal(draw(model, (4, 4, 5), temperature=1e-6, cached=cached), greedy)
    assert torch.equal(model.eval()(greedy).argmax(1), greedy)
    uniform = draw(model, (4, 4, 5), temperature=1e9, cached=cached)
    noise = torch.rand(4, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(uniform, (noise * CODES).long())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_known_codes_are_kept_and_the_rest_follows_them(guidance):
    model = prior(num_classes=3, label_dropout=0.1)
    shape = (3, 5, 4)
    generator = torch.Generator().manual_seed(8)
    known = torch.randint(CODES, shape, generator=generator)
    known[torch.rand(shape, generator=generator) < 0.5] = -1
    known[0] = -1
    before = known.clone()
    plain = draw(model, shape, known=known, cached=False, guidance=guidance)
    completed = draw(model, shape, known=known, guidance=guidance)
    assert torch.equal(completed, plain) and torch.equal(known, before)
    assert torch.equal(completed[known >= 0], known[known >= 0])
    assert torch.equal(completed[0], draw(model, shape, guidance=guidance)[0])
    whole = torch.where(known < 0, 0, known)
    assert torch.equal(draw(model, shape, known=whole, guidance=guidance), whole)


@pytest.mark.parametrize("kept", [1, 4, 6, 19, 20])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_all_grids_know_at_the_beginning_goes_through_in_one_pass(monkeypatch, kept, guidance):
    model, shape = prior(num_classes=3, label_dropout=0.1), (3, 5, 4)
    known = torch.randint(CODES, (3, 20))
    known[:, kept:] = -1
    known[1, 7:9] = 5  # one grid knows more
    known = known.view(shape)
    plain = draw(model, shape, known=known, cached=False, guidance=guidance)
    widths = []
    layer = model.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    assert torch.equal(draw(model, shape, known=known, guidance=guidance), plain)
    assert widths == [kept] + [1] * (20 - kept)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_change_nothing(dtype, guidance):
    model = prior(dtype=dtype, num_classes=3, label_dropout=0.1)
    whole = draw(model, (7, 3, 4), guidance=guidance)
    for chunk in (1, 3, 7, 100):
        assert torch.equal(draw(model, (7, 3, 4), chunk=chunk, guidance=guidance), whole)


@pytest.mark.parametrize("guidance,sizes", [(1.0, [2, 2, 2]), (2.0, [1] * 6)])
def test_chunks_are_made_where_the_caches_would_be_large(monkeypatch, guidance, sizes):
    model = prior(num_classes=3, label_dropout=0.1)
    whole = draw(model, (6, 3, 4), guidance=guidance)
    made = []
    monkeypatch.setattr(transformer_sampling, "CHUNK_BYTES", 2 * 12 * 2 * 3 * 12 * 8)  # two grids' keys and values
    monkeypatch.setattr(
        transformer_sampling,
        "CachedSampler",
        lambda model, codes, *rest: made.append(len(codes)) or CachedSampler(model, codes, *rest),
    )
    assert torch.equal(draw(model, (6, 3, 4), guidance=guidance), whole)
    assert made == sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 1, 6), (2, 6, 1)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_cached_path_gives_the_forward_pass(dtype, shape, guidance):
    """Teacher-forced logits, and the likelihood of a sample, position by position."""
    model = prior(dtype=dtype, num_classes=3, label_dropout=0.1, hidden_channels=24).eval()
    labels = labels_of(model, shape[0])
    codes = draw(model, shape)
    batch, height, width = shape
    sampler = CachedSampler(
        model, torch.full(shape, -1), torch.zeros(shape, dtype=torch.float64), labels, Options(1, 0, 1, guidance)
    )
    sampler.codes.copy_(codes.flatten(1))
    with torch.no_grad():
        rows = torch.stack([sampler.logits(position) for position in range(height * width)], dim=2)
        with_label = rows[:: sampler.copies].unflatten(2, (height, width))
        forward = model(codes, labels)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(with_label, forward, rtol=0, atol=tolerance)
        if guidance != 1:
            without = model(codes, torch.full_like(labels, -1))
            torch.testing.assert_close(rows[1::2].unflatten(2, (height, width)), without, rtol=0, atol=tolerance)
        bits = float(torch.nn.functional.cross_entropy(with_label, codes)) / math.log(2)
        assert abs(bits - float(model.bits_per_code(codes, labels).mean())) < 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_float32_draws_the_same_codes_on_these_seeds(seed):
    model = prior(dtype=torch.float32, num_classes=3)
    draws = [
        model.sample(
            (4, 5, 5),
            labels=torch.arange(4) % 3,
            generator=torch.Generator().manual_seed(seed),
            top_p=0.9,
            cached=cached,
        )
        for cached in (False, True)
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_sampled_in_float32(dtype):
    model = prior(dtype=dtype, num_classes=3)
    half = draw(model, (2, 3, 4))
    assert model.embedding.weight.dtype == dtype
    assert torch.equal(half, draw(model.float(), (2, 3, 4), cached=False))


def test_the_noise_is_drawn_before_the_loop():
    """The generator ends where one tensor of uniform numbers leaves it, whatever is known."""
    model, expected = prior(), torch.Generator().manual_seed(5)
    torch.rand(2, 3, 4, dtype=torch.float64, generator=expected)
    for known in (None, torch.zeros(2, 3, 4, dtype=torch.int64)):
        for cached in (True, False):
            generator = torch.Generator().manual_seed(5)
            model.sample((2, 3, 4), generator=generator, known=known, cached=cached)
            assert torch.equal(generator.get_state(), expected.get_state())


def test_sampling_repeats_under_a_seed_and_keeps_the_mode():
    model = prior(dropout=0.5).train()
    draws = [model.sample((4, 3, 3), generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws) and model.training
    assert not torch.equal(draws[0], model.sample((4, 3, 3), generator=torch.Generator().manual_seed(6)))


def test_a_progress_bar_changes_nothing_and_may_be_absent(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    model = prior()
    quiet = draw(model, (2, 3, 3))
    assert torch.equal(draw(model, (2, 3, 3), progress=True), quiet)
    assert "sampling" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert torch.equal(draw(model, (2, 3, 3), progress=True), quiet)


def test_mistakes_are_named():
    model = prior()
    codes = torch.zeros(1, 2, 2, dtype=torch.int64)
    for options, sentence in [
        ({"temperature": 0.0}, "temperature must be positive, but is 0.0"),
        ({"top_k": 0}, "top_k must be at least 1, but is 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], but is 1.5"),
        ({"guidance": 2.0}, "guidance needs a prior that was built, and trained, with label_dropout above 0"),
        ({"chunk": 0}, "chunk must be at least 1, but is 0"),
        ({"known": codes + CODES}, r"known codes must be in \[-1, 22\], -1 where unknown; one is 23"),
        ({"labels": torch.zeros(1, dtype=torch.int64)}, "labels are not expected"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            model.sample((1, 2, 2), **options)
    with pytest.raises(ValueError, match=r"shape must be \(B, H, W\), but is \(2, 2\)"):
        model.sample((2, 2))
