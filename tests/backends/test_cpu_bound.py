"""The CPU filter's bound (csrc/cpu/codebook.h) at the inner kernels: L <= score, and every winner at or below T."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import inspection

from vqkernels import reference
from vqkernels.backends import cpu
from vqkernels.verification.adversaries import ADVERSARIES, absorbed

pytestmark = pytest.mark.skipif(cpu.load() is not None, reason="the C++ kernels are not built")


def check(z: torch.Tensor, codebook: torch.Tensor) -> None:
    out = inspection.float_filter(z.numpy(), codebook.numpy())
    kept = out["codes"]
    centre, scale = out["centre"].astype(np.float64), float(out["scale"])
    a = (z.double().numpy() - centre) * scale
    b = (codebook.double().numpy()[kept] - centre) * scale
    score = 0.5 * (b * b).sum(1)[None] - a @ b.T
    finite = np.isfinite(out["thresholds"])
    excess = (out["bounds"] - score)[finite]
    assert excess.size == 0 or excess.max() <= 1e-13 * np.abs(score[finite]).max(), (
        f"L above the score by {excess.max()}"
    )
    table = reference.scores(z, codebook)[:, kept].numpy()
    winners = table == table.min(1, keepdims=True)
    assert (out["bounds"][winners] <= np.broadcast_to(out["thresholds"][:, None], winners.shape)[winners]).all()


@pytest.mark.parametrize("level", cpu.simd_levels())
def test_the_bound_holds_where_every_rounding_falls_the_same_way(level, monkeypatch):
    monkeypatch.setenv("VQKERNELS_SIMD", level)
    for d in (17, 65, 257):
        z, codebook = absorbed(1, 3, d)
        check(z, codebook)
        check(z * 3, codebook)
        out = inspection.float_filter(z.numpy(), codebook.numpy())
        order = out["bounds"][0][:2].argmin(), reference.nearest(z, codebook).item()
        assert d < 257 or order == (1, 0), "the adversary no longer reverses the order of its two codes"


@pytest.mark.parametrize("level", cpu.simd_levels())
@pytest.mark.parametrize("name", [n for n in ADVERSARIES if "rows" not in n])
def test_the_bound_holds_on_adversarial_data(name, level, monkeypatch):
    monkeypatch.setenv("VQKERNELS_SIMD", level)
    check(*ADVERSARIES[name](20, 30, 33))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_bound_holds_on_drawn_data(data):
    d = data.draw(st.integers(1, 9))
    values = st.floats(-1e6, 1e6, width=32)
    rows = st.lists(st.lists(values, min_size=d, max_size=d), min_size=1, max_size=6)
    check(torch.tensor(data.draw(rows)), torch.tensor(data.draw(rows)))
