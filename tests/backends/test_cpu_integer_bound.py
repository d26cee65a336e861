"""The int16 filter's certificate (csrc/cpu/codebook16.h) at the inner kernels: every winner scores at or below T."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vqkernels as vq
from vqkernels import reference
from vqkernels.backends import cpu
from vqkernels.verification.adversaries import ADVERSARIES

_C = pytest.importorskip("vqkernels._C", reason="the optional module _C was not built")
LEVELS = [level for level in cpu.simd_levels() if level != "baseline"]
pytestmark = pytest.mark.skipif(not LEVELS, reason="no level of this CPU has the int16 filter")


def check(z: torch.Tensor, codebook: torch.Tensor) -> float:
    """Asserts the certificate; returns the fraction of rows that fit, 0 where the filter is not used."""
    out = _C.integer_filter(z.numpy(), codebook.numpy())
    if not out["usable"]:
        return 0.0
    kept, fits = np.array(out["code_of_slot"]), out["fits"]
    table = reference.scores(z, codebook)[:, kept].numpy()
    winners = (table == table.min(1, keepdims=True)) & fits[:, None]
    limit = np.broadcast_to(out["thresholds"][:, None], winners.shape)
    assert (out["scores"][winners] <= limit[winners]).all()
    assert np.abs(out["scores"][fits]).max(initial=0) < 2**31 - 1
    return float(fits.mean())


def rounded_the_wrong_way(d: int = 64, rows: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Roundings of z and of two codes that all fall along the line through them, each by nearly half a unit a channel.

    Code 0 is rounded away from z, z away from code 0, code 1 towards z: the integer distances are off by all of w, in
    opposite directions. In `d` channels the codes are all but equally far; one more, which rounds to itself, makes
    code 0 the nearer one. Two codes far away in a channel of their own hold the scale, and the mean at zero.
    """
    scale = 30000.0
    for _ in range(6):
        z, codes = torch.zeros(rows, d + 3, dtype=torch.float64), torch.zeros(4, d + 3, dtype=torch.float64)
        sign = torch.ones(d, dtype=torch.float64)
        sign[1::2] = -1
        codes[0, :d], codes[1, :d], z[:-1, :d] = 300.501 * sign, -299.499 * sign, 0.499 * sign
        codes[0, d], codes[1, d], z[:-1, d] = 20, -20, 2
        codes, z = codes / scale, z / scale
        codes[2] = -codes[0] - codes[1]
        codes[2, d + 1], codes[3, d + 1], z[-1, d + 2] = 1.0, -1.0, 1.0
        scale = _C.integer_filter(z.float().numpy(), codes.float().numpy())["scale"]
    return z.float(), codes.float()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_every_winner_is_kept_on_adversarial_data(name, level, monkeypatch):
    monkeypatch.setenv("VQKERNELS_SIMD", level)
    check(*ADVERSARIES[name](130, 30, 33))


@pytest.mark.parametrize("level", LEVELS)
def test_gaussian_rows_fit_and_are_mostly_decided(level, monkeypatch):
    monkeypatch.setenv("VQKERNELS_SIMD", level)
    z, codebook = torch.randn(500, 64), torch.randn(200, 64)
    assert check(z, codebook) == 1.0
    out = _C.integer_filter(z.numpy(), codebook.numpy())
    undecided = (np.sort(out["scores"], 1)[:, 1] <= out["thresholds"]).mean()
    assert undecided < 0.03


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_winner_is_kept_on_drawn_data(data):
    d = data.draw(st.integers(16, 20))
    values = st.sampled_from([0.0, 1.0, -1.0, 0.5, 3e-5, 1e3, 0.3333, 7.77, -2.5e-3])
    rows = st.lists(st.lists(values, min_size=d, max_size=d), min_size=1, max_size=5)
    z = torch.tensor(data.draw(rows)).repeat(128, 1)[:130]
    check(z + 1e-4 * torch.arange(len(z))[:, None] / len(z), torch.tensor(data.draw(rows)))


@pytest.mark.parametrize("level", LEVELS)
def test_the_certificate_is_tight_and_holds(level, monkeypatch):
    monkeypatch.setenv("VQKERNELS_SIMD", level)
    z, codebook = rounded_the_wrong_way()
    assert check(z, codebook) > 0.9
    out = _C.integer_filter(z.numpy(), codebook.numpy())
    scores, threshold = out["scores"][0], out["thresholds"][0]
    assert reference.nearest(z, codebook)[0] == 0 and scores.argmin() == 1, (
        "the adversary reverses the order of two codes"
    )
    assert threshold - scores[1] < 1.02 * (scores[0] - scores[1]), "and leaves the certificate hardly any room"
    assert vq.nearest_code(z, codebook, backend="cpu").equal(reference.nearest(z, codebook))
