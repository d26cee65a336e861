"""The cached sampler draws the codes of the plain one, for every option and shape; its likelihood is the model's."""

import math
import sys

import pytest
import torch

from vqkernels.models import PixelCNN, pixelcnn_sampling
from vqkernels.models.pixelcnn_sampling import CachedSampler, Options, PackedPixelCNN

CODES = 37


def prior(*, dtype: torch.dtype = torch.float64, **options) -> PixelCNN:
    """Small, with logits that are far from uniform."""
    torch.manual_seed(0)
    model = PixelCNN(CODES, **{"hidden_channels": 9, "num_layers": 4, "head_channels": 21, **options}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def inputs(model: PixelCNN, shape: tuple[int, int, int]) -> dict:
    """Labels and condition where the model wants them."""
    batch, height, width = shape
    given: dict = {}
    if model.num_classes is not None:
        given["labels"] = torch.arange(batch) % model.num_classes
    if model.condition_channels is not None:
        condition = torch.randn(batch, model.condition_channels, height, width, generator=torch.Generator())
        given["condition"] = condition.to(model.embedding.weight.dtype)
    return given


def draw(model: PixelCNN, shape: tuple[int, int, int], **options) -> torch.Tensor:
    return model.sample(shape, generator=torch.Generator().manual_seed(3), **inputs(model, shape), **options)


def assert_cached_is_plain(model: PixelCNN, shape: tuple[int, int, int], backend: str, **options) -> None:
    plain = draw(model, shape, cached=False, **options)
    assert plain.shape == shape and bool(((plain >= 0) & (plain < CODES)).all())
    assert torch.equal(draw(model, shape, backend=backend, **options), plain)


OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 5.0},
    "top_k": {"top_k": 3},
    "greedy": {"top_k": 1},
    "top_k above K": {"top_k": 1000},
    "top_p": {"top_p": 0.6},
    "top_p of one code": {"top_p": 1e-9},
    "all": {"temperature": 1.7, "top_k": 9, "top_p": 0.8},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(backend, options):
    model = prior(num_classes=3, label_dropout=0.1)
    assert_cached_is_plain(model, (3, 4, 5), backend, **options)
    assert_cached_is_plain(model, (3, 4, 5), backend, guidance=2.5, **options)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 1, 1), (1, 7, 1), (1, 1, 7), (3, 2, 9), (3, 9, 2), (17, 3, 3), (0, 3, 3), (2, 0, 3)]
)
def test_every_shape(backend, shape):
    assert_cached_is_plain(prior(), shape, backend)
    assert_cached_is_plain(prior(num_classes=2, condition_channels=3), shape, backend)


MODELS = {
    "one layer": {"num_layers": 1},
    "two layers": {"num_layers": 2},
    "wide kernels": {"kernel_size": 5, "first_kernel_size": 9},
    "smallest kernels": {"first_kernel_size": 3},
    "one channel": {"hidden_channels": 1, "head_channels": 1},
    "whole panels": {"hidden_channels": 32, "head_channels": 64},
    "no ReLU before the head": {"head_activation": False},
    "condition": {"condition_channels": 5},
    "label and condition": {"condition_channels": 2, "num_classes": 4},
    "dropout": {"dropout": 0.9},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_every_model(backend, options):
    assert_cached_is_plain(prior(**options), (2, 5, 6), backend)


def test_guidance_is_the_formula(backend):
    """0 is the prior without labels, 1 the prior with them; -1 asks for no label."""
    model = prior(num_classes=3, label_dropout=0.1)
    shape, none = (3, 4, 4), torch.full((3,), -1)
    without = model.sample(shape, labels=none, generator=torch.Generator().manual_seed(3), backend=backend)
    assert torch.equal(draw(model, shape, guidance=0.0, backend=backend), without)
    assert not torch.equal(draw(model, shape, guidance=1.0, backend=backend), without)
    assert not torch.equal(draw(model, shape, guidance=4.0, backend=backend), draw(model, shape, backend=backend))
    assert_cached_is_plain(model, shape, backend, guidance=-0.5)


def test_labels_reach_the_samples(backend):
    """A dropped label would draw the same grid from the same noise."""
    model = prior(num_classes=3)
    grids = []
    for label in range(3):
        labels = torch.full((2,), label)
        generator = torch.Generator().manual_seed(3)
        grids.append(model.sample((2, 4, 4), labels=labels, generator=generator, backend=backend))
    assert not torch.equal(grids[0], grids[1]) and not torch.equal(grids[1], grids[2])


def test_the_temperature_reaches_the_samples(backend):
    """Nearly 0 is greedy; large is uniform."""
    model = prior()
    greedy = draw(model, (8, 5, 5), top_k=1, backend=backend)
    assert torch.equal(draw(model, (8, 5, 5), temperature=1e-6, backend=backend), greedy)
    uniform = draw(model, (8, 5, 5), temperature=1e9, backend=backend)
    noise = torch.rand(8, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(uniform, (noise * CODES).long())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_known_codes_are_kept_and_the_rest_follows_them(backend, guidance):
    model = prior(num_classes=3, label_dropout=0.1)
    shape = (3, 5, 4)
    generator = torch.Generator().manual_seed(8)
    known = torch.randint(CODES, shape, generator=generator)
    known[torch.rand(shape, generator=generator) < 0.5] = -1
    known[0] = -1
    before = known.clone()
    plain = draw(model, shape, known=known, cached=False, guidance=guidance)
    completed = draw(model, shape, known=known, backend=backend, guidance=guidance)
    assert torch.equal(completed, plain) and torch.equal(known, before)
    assert torch.equal(completed[known >= 0], known[known >= 0])
    assert torch.equal(completed[0], draw(model, shape, backend=backend, guidance=guidance)[0])
    whole = torch.where(known < 0, 0, known)
    assert torch.equal(draw(model, shape, known=whole, backend=backend, guidance=guidance), whole)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_chunks_change_nothing(backend, guidance):
    model = prior(num_classes=3, label_dropout=0.1, condition_channels=2)
    whole = draw(model, (7, 3, 4), backend=backend, guidance=guidance)
    for chunk in (1, 3, 7, 100):
        assert torch.equal(draw(model, (7, 3, 4), backend=backend, chunk=chunk, guidance=guidance), whole)


def test_chunks_are_made_where_the_caches_would_be_large(monkeypatch, backend):
    whole = draw(prior(), (6, 3, 4), backend=backend)
    made = []
    monkeypatch.setattr(pixelcnn_sampling, "CHUNK_BYTES", 2 * PackedPixelCNN(prior()).sizes.cache_elements(1, 4) * 8)
    monkeypatch.setattr(
        pixelcnn_sampling,
        "CachedSampler",
        lambda packed, codes, *rest, **named: made.append(len(codes)) or CachedSampler(packed, codes, *rest, **named),
    )
    assert torch.equal(draw(prior(), (6, 3, 4), backend=backend), whole)
    assert made == [2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 1, 6), (2, 6, 1)])
def test_the_cached_path_gives_the_forward_pass(backend, dtype, shape):
    """Teacher-forced logits, and the likelihood of a sample, position by position."""
    model = prior(dtype=dtype, num_classes=3, condition_channels=2, hidden_channels=16, head_channels=48)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(2)  # as initialised
    given = inputs(model, shape)
    codes = draw(model, shape, backend=backend)
    batch, height, width = shape
    noise = torch.zeros(shape, dtype=torch.float64)
    sampler = CachedSampler(
        PackedPixelCNN(model), codes.clone(), noise, *given.values(), Options(1, 0, 1, 1), backend=backend
    )
    logits = torch.empty(height * width, batch, CODES, dtype=dtype)
    for position in range(height * width):
        sampler.advance(position, position + 1, logits[position : position + 1])
    assert torch.equal(sampler.codes, codes)
    forced = logits.permute(1, 2, 0).unflatten(2, (height, width))
    with torch.no_grad():
        forward = model.eval()(codes, **given)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(forced, forward, rtol=0, atol=tolerance)
        bits = float(torch.nn.functional.cross_entropy(forced, codes)) / math.log(2)
        assert abs(bits - float(model.bits_per_code(codes, **given).mean())) < 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_float32_draws_the_same_codes_on_these_seeds(backend, seed):
    model = prior(dtype=torch.float32, hidden_channels=16, num_classes=3)
    labels = torch.arange(4) % 3
    draws = [
        model.sample((4, 6, 6), labels=labels, generator=torch.Generator().manual_seed(seed), top_p=0.9, **how)
        for how in ({"cached": False}, {"backend": backend})
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_sampled_in_float32(backend, dtype):
    model = prior(dtype=dtype, num_classes=3, condition_channels=2)
    assert torch.equal(draw(model, (2, 3, 4), backend=backend), draw(model.float(), (2, 3, 4), cached=False))


def test_the_noise_is_drawn_before_the_loop(backend):
    """The generator ends where one tensor of uniform numbers leaves it, whatever is known."""
    model, expected = prior(), torch.Generator().manual_seed(5)
    torch.rand(2, 3, 4, dtype=torch.float64, generator=expected)
    for known in (None, torch.zeros(2, 3, 4, dtype=torch.int64)):
        for cached in (True, False):
            generator = torch.Generator().manual_seed(5)
            model.sample((2, 3, 4), generator=generator, known=known, cached=cached, backend=backend)
            assert torch.equal(generator.get_state(), expected.get_state())


def test_a_progress_bar_changes_nothing_and_may_be_absent(monkeypatch, capsys, backend):
    pytest.importorskip("tqdm")
    model = prior()
    quiet = draw(model, (2, 3, 3), backend=backend)
    assert torch.equal(draw(model, (2, 3, 3), backend=backend, progress=True), quiet)
    assert "sampling" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert torch.equal(draw(model, (2, 3, 3), backend=backend, progress=True), quiet)


def test_mistakes_are_named():
    model = prior()
    codes = torch.zeros(1, 2, 2, dtype=torch.int64)
    for options, sentence in [
        ({"temperature": 0.0}, "temperature must be positive, but is 0.0"),
        ({"top_k": 0}, "top_k must be at least 1, but is 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], but is 1.5"),
        ({"guidance": 2.0}, "guidance needs a prior that was built, and trained, with label_dropout above 0"),
        ({"chunk": 0}, "chunk must be at least 1, but is 0"),
        ({"known": codes[0]}, r"known must be \(1, 2, 2\) int64, but is \(2, 2\) of torch.int64"),
        ({"known": codes.float()}, r"known must be \(1, 2, 2\) int64, but is \(1, 2, 2\) of torch.float32"),
        ({"known": codes + CODES}, r"known codes must be in \[-1, 36\], -1 where unknown; one is 37"),
        ({"condition": torch.zeros(1, 1, 2, 2)}, "condition is not expected"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            model.sample((1, 2, 2), **options)
    with pytest.raises(ValueError, match=r"shape must be \(B, H, W\), but is \(2, 2\)"):
        model.sample((2, 2))
    with pytest.raises(ValueError, match="a condition of 3 channels is needed"):
        prior(condition_channels=3).sample((1, 2, 2))
    with pytest.raises(ValueError, match=r"condition must have shape \(1, 3, 2, 2\), but has \(1, 3, 2, 1\)"):
        prior(condition_channels=3).sample((1, 2, 2), condition=torch.zeros(1, 3, 2, 1))
