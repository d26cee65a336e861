"""Sonnet's checkpoints: its documented moving averages, stated here, go on in our layer; and the way back."""

import pytest
import torch
from torch.nn import functional as F

from vqkernels.dropin.sonnet import from_sonnet, to_sonnet
from vqkernels.nn import VectorQuantizer

D, K, DECAY, EPSILON = 5, 12, 0.9, 1e-5


def start(generator: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(generator)
    return {
        "embeddings": torch.randn(D, K),
        "ema_cluster_size/hidden": torch.zeros(K),
        "ema_cluster_size/average": torch.zeros(K),
        "ema_cluster_size/counter": torch.tensor(0),
        "ema_dw/hidden": torch.zeros(D, K),
        "ema_dw/average": torch.zeros(D, K),
        "ema_dw/counter": torch.tensor(0),
    }


def step(state: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """One training step in Sonnet's terms: averages divided by 1 - decay^t, Laplace smoothing; the indices."""
    indices = torch.cdist(rows.double(), state["embeddings"].T.double()).argmin(1)
    one_hot = F.one_hot(indices, K).float()
    for name, value in (("ema_cluster_size", one_hot.sum(0)), ("ema_dw", rows.T @ one_hot)):
        state[f"{name}/counter"] = state[f"{name}/counter"] + 1
        state[f"{name}/hidden"] = DECAY * state[f"{name}/hidden"] + (1 - DECAY) * value
        state[f"{name}/average"] = state[f"{name}/hidden"] / (1 - DECAY ** state[f"{name}/counter"])
    size, total = state["ema_cluster_size/average"], state["ema_cluster_size/average"].sum()
    smoothed = (size + EPSILON) / (total + K * EPSILON) * total
    state["embeddings"] = state["ema_dw/average"] / smoothed
    return indices


def test_averages_go_on_where_sonnet_left_them():
    state = start()
    for _ in range(5):
        step(state, torch.randn(400, D))
    layer = from_sonnet({f"{k}:0": v.numpy() for k, v in state.items()}, commitment_cost=0.5, decay=DECAY)
    assert layer.beta == 0.5 and layer.codebook.equal(state["embeddings"].T)
    for _ in range(20):
        rows = torch.randn(400, D)
        quantized, indices, loss = layer(rows)
        found = state["embeddings"].T.clone()
        assert indices.equal(step(state, rows))
        torch.testing.assert_close(loss, 0.5 * (found[indices] - rows).square().mean(), rtol=1e-4, atol=1e-5)
    back = to_sonnet(layer)
    assert back.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(back[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_codes_trained_by_the_loss_there_and_back():
    codes = torch.randn(D, K)
    layer = from_sonnet({"embeddings": codes}, commitment_cost=0.25, channel_dim=1)
    assert layer.ema_decay is None and layer.channel_dim == 1 and isinstance(layer.codebook, torch.nn.Parameter)
    rows = torch.randn(50, D)
    indices = torch.cdist(rows.double(), codes.T.double()).argmin(1)
    found = codes.T[indices]
    _, mine, loss = layer(rows)
    assert mine.equal(indices)
    torch.testing.assert_close(loss, 1.25 * (found - rows).square().mean())
    assert to_sonnet(layer).keys() == {"embeddings"} and to_sonnet(layer)["embeddings"].equal(codes)


def test_an_untrained_layer_has_averages_of_zero():
    back = to_sonnet(VectorQuantizer(D, K, ema_decay=DECAY))
    assert all(not value.any() for name, value in back.items() if name != "embeddings")


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"variables must hold 'embeddings' with 2 axes, got no such variable"):
        from_sonnet({}, commitment_cost=0.25)
    with pytest.raises(ValueError, match="the variables are of a VectorQuantizerEMA: give its decay, got decay=None"):
        from_sonnet(start(), commitment_cost=0.25)
    with pytest.raises(ValueError, match=r"without averages: decay is None, got decay=0.9"):
        from_sonnet({"embeddings": torch.zeros(D, K)}, commitment_cost=0.25, decay=0.9)
    broken = start() | {"ema_cluster_size/hidden": torch.zeros(D, K)}
    with pytest.raises(ValueError, match=r"'ema_cluster_size/hidden' with 1 axes, got shape \[5, 12\]"):
        from_sonnet(broken, commitment_cost=0.25, decay=0.9)
    for options, name in (
        (dict(heads=5), "heads=5"),
        (dict(codebook_dim=2), "codebook_dim=2"),
        (dict(metric="cosine"), "metric='cosine'"),
    ):
        with pytest.raises(ValueError, match=f"Sonnet's quantizer has no {name}"):
            to_sonnet(VectorQuantizer(D, K, **options))
