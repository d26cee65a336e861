"""EnCodec: Meta's layers beside their documented formulas, `transformers` beside the installed package."""

import pytest
import torch
from dropin.parity import assert_same_codes, assert_same_state, gradients, load_both_ways
from torch import nn
from torch.nn import functional as F

from vqkernels import restore_quantizers, swap_quantizers
from vqkernels.dropin import encodec, swap
from vqkernels.dropin.encodec import EuclideanCodebook, ResidualVectorQuantization, VectorQuantization

K, D, T = 24, 6, 20


class StatedCodebook(nn.Module):
    """Moving averages with Laplace smoothing, from one-hot matrices."""

    def __init__(self, dim, size, decay, epsilon):
        super().__init__()
        self.decay, self.epsilon, self.codebook_size, self.kmeans_iters = decay, epsilon, size, 50
        self.threshold_ema_dead_code = 2
        self.register_buffer("inited", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("embed", torch.randn(size, dim))
        self.register_buffer("embed_avg", self.embed.clone())

    def forward(self, x):
        rows = x.detach().reshape(-1, x.shape[-1])
        indices = torch.cdist(rows.double(), self.embed.double()).argmin(1)
        found = self.embed[indices].view(x.shape)
        if self.training:
            one_hot = F.one_hot(indices, len(self.embed)).to(rows.dtype)
            self.cluster_size.lerp_(one_hot.sum(0), 1 - self.decay)
            self.embed_avg.lerp_(one_hot.T @ rows, 1 - self.decay)
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + self.epsilon) / (total + len(self.embed) * self.epsilon) * total
            self.embed.copy_(self.embed_avg / smoothed[:, None])
        return found, indices.view(x.shape[:-1])


class Stated(nn.Module):
    def __init__(self, dim, size, inner, weight=1.0):
        super().__init__()
        self.project_in = nn.Linear(dim, inner) if inner != dim else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if inner != dim else nn.Identity()
        self._codebook = StatedCodebook(inner, size, 0.9, 1e-5)
        self.commitment_weight, self.codebook_size, self.epsilon = weight, size, 1e-5

    def forward(self, x):
        x = self.project_in(x.transpose(1, 2))
        found, indices = self._codebook(x)
        loss = torch.zeros(1, requires_grad=self.training)
        if self.training:
            loss = loss + self.commitment_weight * F.mse_loss(found, x)
            found = x + (found - x).detach()
        return self.project_out(found).transpose(1, 2), indices, loss


Stated.__module__, Stated.__qualname__ = "encodec.quantization.core_vq", "VectorQuantization"


@pytest.fixture(params=[D, 4], ids=["plain", "projected"])
def pair(request):
    ours = VectorQuantization(D, K, request.param, decay=0.9, kmeans_init=False, commitment_weight=0.5)
    theirs = Stated(D, K, request.param, 0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients(pair, training):
    ours, theirs = (layer.double().train(training) for layer in pair)
    z = torch.randn(2, D, T, dtype=torch.float64)
    codes, rows = theirs._codebook.embed.clone(), theirs.project_in(z.transpose(1, 2)).detach().flatten(0, 1)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    mine, other = ours(z), theirs(z)
    assert assert_same_codes(mine[1], other[1], rows, codes).all()
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert mine[2].requires_grad == training and (training or float(mine[2]) == 0)
    for layer in (ours, theirs):
        layer.load_state_dict(state)
    mine, other = (gradients(layer, z, lambda out: [out[0], out[2]]) for layer in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert training or mine[0].count_nonzero() == 0  # in eval the peer's output has no gradient to x


def test_twenty_steps_and_checkpoints(pair):
    ours, theirs = pair
    for _ in range(20):
        z = torch.randn(3, D, T)
        mine, other = ours(z), theirs(z)
        torch.testing.assert_close(mine[2], other[2])
        assert mine[1].equal(other[1])
    assert_same_state(ours, theirs, rtol=1e-4, atol=1e-5)
    load_both_ways(ours, theirs)


def test_a_swapped_layer_goes_on_from_the_same_averages_and_gives_them_back():
    model, theirs = nn.Sequential(Stated(D, K, D)), Stated(D, K, D)
    theirs.load_state_dict(model[0].state_dict())
    model[0]._codebook.decay = theirs._codebook.decay = 0.8
    buffers, inner, seen = dict(model.named_buffers()), model[0]._codebook, []
    inner._register_state_dict_hook(lambda *_: seen.append("state"))
    swap_quantizers(model)
    assert type(model[0]) is VectorQuantization and type(model[0]._codebook) is EuclideanCodebook
    assert all(value is buffers[key] for key, value in model.named_buffers()) and len(buffers) == 4
    for change in (lambda m: None, lambda m: m.to(torch.float64), restore_quantizers):
        change(model)
        for _ in range(10):
            z = torch.randn(2, D, T)
            for layer in (model, theirs):
                layer(z.to(next(layer.buffers()).dtype))
        assert seen == [] and list(model.state_dict()) == [f"0.{key}" for key in theirs.state_dict()]
        seen.clear()
    assert type(model[0]) is Stated and model[0]._codebook is inner
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(model.state_dict()[f"0.{key}"].float(), value, rtol=1e-4, atol=1e-5)


def test_a_hook_on_the_inner_codebook_leaves_the_layer():
    model = nn.Sequential(Stated(D, K, D))
    model[0]._codebook.register_forward_hook(lambda *_: None)
    assert "its module '_codebook' has hooks" in swap_quantizers(model).left[0].reason


def test_codes_begin_as_means_of_the_first_rows():
    torch.manual_seed(2)
    centres = 10 * torch.randn(5, D)
    x = (centres.repeat_interleave(8, 0) + 0.01 * torch.randn(40, D)).view(1, 40, D).transpose(1, 2)
    layer = VectorQuantization(D, 5, kmeans_init=True)
    assert layer._codebook.inited.item() == 0 and not layer.codebook.any()
    layer(x[:, :, :0])
    assert layer._codebook.inited.item() == 0  # no rows, no codes
    layer.eval()(x)
    assert layer._codebook.inited.item() == 1 and (torch.cdist(centres, layer.codebook).min(1).values < 0.1).all()
    assert layer._codebook.cluster_size.tolist() == 5 * [8.0]
    assert layer._codebook.embed_avg.equal(layer.codebook)
    other = VectorQuantization(D, 5, kmeans_init=True)
    other.load_state_dict(layer.state_dict())
    other.eval()(-x)
    assert other.codebook.equal(layer.codebook)  # loaded codes are kept


def test_a_bad_row_and_no_rows_leave_the_codebook_finite():
    codebook = EuclideanCodebook(D, K)
    before = codebook.embed.clone()
    codebook(torch.randn(0, D))
    assert codebook.embed.equal(before) and not codebook.cluster_size.any()
    x = torch.randn(30, D)
    x[3, 2] = torch.nan
    codebook(x)
    assert codebook.embed.isfinite().all() and codebook.cluster_size.sum().isclose(torch.tensor(0.29))


def test_residual_layers():
    ours = ResidualVectorQuantization(num_quantizers=3, dim=D, codebook_size=K, kmeans_init=False)
    theirs = nn.ModuleList(Stated(D, K, D) for _ in range(3))
    ours.layers.load_state_dict(theirs.state_dict())
    for layer in theirs:
        layer._codebook.decay = 0.99
    x = torch.randn(2, D, T, requires_grad=True)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        quantized, indices, losses = ours(x)
        residual, total, found, lost = x, 0.0, [], []
        for layer in theirs:
            part, index, loss = layer(residual)
            residual, total = residual - part, total + part
            found.append(index)
            lost.append(loss)
        assert indices.equal(torch.stack(found)) and losses.shape == (3, 1)
        torch.testing.assert_close((quantized, losses), (total, torch.stack(lost)), rtol=1e-4, atol=1e-5)
        if training:
            mine, other = (
                torch.autograd.grad(a.sum() + b.sum(), x)[0] for a, b in ((quantized, losses), (total, sum(lost)))
            )
            torch.testing.assert_close(mine, other)
    assert ours.encode(x).equal(indices) and ours.encode(x, 2).equal(indices[:2])
    torch.testing.assert_close(ours.decode(indices), quantized)


transformers = pytest.importorskip("transformers")


def model():
    config = transformers.EncodecConfig(
        num_filters=4, hidden_size=8, codebook_dim=8, codebook_size=64, num_lstm_layers=1, upsampling_ratios=[4, 2]
    )
    torch.manual_seed(0)
    built = transformers.EncodecModel(config).eval()
    with torch.no_grad():
        for layer in built.quantizer.layers[:8]:
            layer.codebook.embed.normal_(std=0.1)
    return built


def test_a_whole_transformers_model_encodes_and_decodes_the_same():
    theirs, ours = model(), model()
    peers = list(ours.quantizer.layers)
    report = swap_quantizers(ours)
    assert len(report.swapped) == len(peers) and report[0].name == "quantizer.layers.0" and not report.left
    assert type(ours.quantizer.layers[0]) is encodec.EncodecVectorQuantization
    assert_same_state(ours, theirs, rtol=0, atol=0)
    audio = torch.randn(2, 1, 2400)
    with torch.no_grad():
        codes, codes_ = (m.encode(audio, bandwidth=6.0).audio_codes for m in (ours, theirs))
        assert (codes == codes_).float().mean() >= 0.999 and codes.shape == codes_.shape
        torch.testing.assert_close(ours.decode(codes_, [None])[0], theirs.decode(codes_, [None])[0])
        torch.testing.assert_close(ours(audio).audio_values, theirs(audio).audio_values, rtol=1e-3, atol=1e-3)
    state = {key: value + 1 if value.is_floating_point() else value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    ours.to(torch.float64)
    restore_quantizers(ours)
    assert list(ours.quantizer.layers) == peers
    assert all(
        ours.state_dict()[key].equal(value.double()) for key, value in state.items() if value.is_floating_point()
    )


@pytest.mark.parametrize("kind", ["VectorQuantization", "EuclideanCodebook"])
def test_transformers_layers_alone(kind):
    peer = getattr(transformers.models.encodec.modeling_encodec, f"Encodec{kind}")
    config = transformers.EncodecConfig(codebook_size=64, codebook_dim=8, hidden_size=8)
    theirs, built = peer(config), getattr(encodec, f"Encodec{kind}")(config)
    assert list(built.state_dict()) == list(theirs.state_dict())
    for value in theirs.buffers():
        value.normal_()
    ours = swap.ADAPTERS[f"{peer.__module__}.{peer.__qualname__}"](theirs)
    load_both_ways(built, theirs)
    x = torch.randn(5, 8, 300) if kind == "VectorQuantization" else torch.randn(5, 300, 8)
    rows = x.transpose(1, 2).reshape(-1, 8) if kind == "VectorQuantization" else x.reshape(-1, 8)
    codes = getattr(theirs, "codebook", theirs).embed
    for layer in (ours, built):
        layer.load_state_dict(theirs.state_dict())
        assert_same_codes(layer.encode(x), theirs.encode(x), rows, codes)
        assert layer.decode(layer.encode(x)).equal(theirs.decode(layer.encode(x)))
    if kind == "EuclideanCodebook":
        assert_same_codes(ours.quantize(rows), theirs.quantize(rows), rows, codes)
