"""The integer filters' certificates (csrc/cpu/codebook16.h) at the inner kernels: every winner scores at or below T."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import inspection

import vqkernels as vq
from vqkernels import reference
from vqkernels.backends import cpu
from vqkernels.verification.adversaries import ADVERSARIES

LEVELS = [level for level in cpu.simd_levels() if level != "baseline"]
pytestmark = pytest.mark.skipif(not LEVELS, reason="no level of this CPU has the int16 filter")


PASSES = ("fine", "coarse")


def check(z: torch.Tensor, codebook: torch.Tensor) -> float:
    """Asserts the certificates; returns the fraction of rows that fit, 0 where the filters are not used."""
    out = inspection.integer_filter(z.numpy(), codebook.numpy())
    if out is None:
        return 0.0
    codes, taken = out["codes"], out["fits"] & out["clear"]
    table = reference.scores(z, codebook).numpy()
    winners = (table == table.min(1, keepdims=True)) & taken[:, None]
    aside = np.setdiff1d(np.flatnonzero(codebook.isfinite().all(1).numpy()), codes)
    copies = [k for k in aside if (codebook[codes] == codebook[k]).all(1).any()]
    assert not winners[:, np.setdiff1d(aside, copies)].any(), "a code set aside wins a row that is clear of it"
    for name in PASSES:
        if name in out:
            scores, limits = out[name]["scores"], out[name]["limits"]
            within = scores <= limits[:, None]
            assert within[winners[:, codes]].all(), f"a winner is above the limit of the {name} filter"
            assert np.abs(scores[out["fits"]]).max(initial=0) < 2**31 - 1
    return float(out["fits"].mean())


def rounded_the_wrong_way(d: int = 64, rows: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """For int16: roundings of z and of two codes that all fall along the line through them, by nearly half a unit each.

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
        scale = inspection.integer_filter(z.float().numpy(), codes.float().numpy())["scale"]
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
    out = inspection.integer_filter(z.numpy(), codebook.numpy())
    left = {name: (out[name]["scores"] <= out[name]["limits"][:, None]).sum(1).mean() for name in PASSES if name in out}
    assert left["fine"] < 1.03
    assert left.get("coarse", 1.0) < 6
    assert ("coarse" in left) == (level == "vnni")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_winner_is_kept_on_drawn_data(data):
    d = data.draw(st.integers(1, 20))
    values = st.sampled_from([0.0, 1.0, -1.0, 0.5, 3e-5, 1e3, 0.3333, 7.77, -2.5e-3])
    rows = st.lists(st.lists(values, min_size=d, max_size=d), min_size=1, max_size=5)
    z = torch.tensor(data.draw(rows)).repeat(128, 1)[:130]
    check(z + 1e-4 * torch.arange(len(z))[:, None] / len(z), torch.tensor(data.draw(rows)))


@pytest.mark.parametrize("level", LEVELS)
def test_codes_set_aside_still_win_their_rows(level, monkeypatch):
    monkeypatch.setenv("VQKERNELS_SIMD", level)
    z, codebook = torch.randn(400, 32), torch.randn(100, 32)
    codebook[[3, 40]] *= 1000
    z[:4] = codebook[40] + torch.randn(4, 32)
    z[4:8] = codebook[3] / 2 + torch.linspace(-1e-3, 1e-3, 4)[:, None] * codebook[3]  # about half way
    check(z, codebook)
    out = inspection.integer_filter(z.numpy(), codebook.numpy())
    assert set(range(100)) - set(out["codes"]) == {3, 40}
    assert out["clear"][8:].all(), "ordinary rows need no second look"
    expected = reference.nearest(z, codebook)
    assert vq.nearest_code(z, codebook, backend="cpu").equal(expected)
    assert (expected[:4] == 40).all()


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("level", LEVELS)
def test_products_are_filtered_too(level, metric, monkeypatch):
    monkeypatch.setenv("VQKERNELS_SIMD", level)
    z, codebook = torch.randn(600, 48), torch.randn(300, 48) * torch.rand(300, 1)
    codebook[100], codebook[200] = 0, codebook[7] * 2
    indices, decided = vq.nearest_code(z, codebook, metric=metric, backend="cpu", return_certificate=True)
    assert indices.equal(reference.nearest(z, codebook, metric=metric))
    assert decided > 0.9


@pytest.mark.parametrize("level", LEVELS)
def test_the_certificate_is_tight_and_holds(level, monkeypatch):
    monkeypatch.setenv("VQKERNELS_SIMD", level)
    z, codebook = rounded_the_wrong_way()
    assert check(z, codebook) > 0.9
    out = inspection.integer_filter(z.numpy(), codebook.numpy())
    scores, threshold = out["fine"]["scores"][0], out["fine"]["limits"][0]
    assert reference.nearest(z, codebook)[0] == 0 and scores.argmin() == 1, (
        "the adversary reverses the order of two codes"
    )
    assert threshold - scores[1] < 1.02 * (scores[0] - scores[1]), "and leaves the certificate hardly any room"
    assert vq.nearest_code(z, codebook, backend="cpu").equal(reference.nearest(z, codebook))


@pytest.mark.parametrize("level", LEVELS)
def test_the_limit_is_the_one_that_was_proved(level, monkeypatch):
    """T by distances, from the header's formula in float64 on the roundings themselves: no slack may be left out."""
    monkeypatch.setenv("VQKERNELS_SIMD", level)
    z, codebook = torch.randn(300, 64), torch.randn(100, 64)
    out, packed = (
        inspection.integer_filter(z.numpy(), codebook.numpy()),
        inspection.float_filter(z.numpy(), codebook.numpy()),
    )
    centre, inner = packed["centre"], packed["scale"]
    outer = np.float32(out["scale"] / inner)

    def rounded(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The integer vectors, how far the float32 values are from them, and 4u times the norms of the real ones."""
        scaled = ((rows - centre) * inner * outer).astype(np.float32)
        q = np.rint(scaled).astype(np.float64)
        real = (rows.astype(np.float64) - centre) * (float(inner) * float(outer))
        return q, np.linalg.norm(scaled - q, axis=1), 4 * 2.0**-24 * np.linalg.norm(real, axis=1)

    q, row_lost, row_slack = rounded(z.numpy())
    p, code_lost, code_slack = rounded(codebook.numpy()[out["codes"]])
    w = row_lost + row_slack + (code_lost + code_slack).max()
    scores = out["fine"]["scores"]
    nearest = np.linalg.norm(q - p[scores.argmin(1)], axis=1)
    window = 1 + 2 * w * (nearest + w)
    excess = out["fine"]["limits"] - scores.min(1) - window
    assert (excess > -1).all(), "T lies below the proved one"
    assert (excess < 2 + 1e-3 * window).all(), "T is looser than it need be"
