"""csrc/margin.h, which the CUDA kernels compile, computes the threshold of margin.py, which test_margin.py attacks."""

import ctypes

import numpy as np
import pytest
import torch
from native.build import build_host_library, compiler

pytest.importorskip("triton")

from backends.triton.test_margin import threshold_kernel

METRICS = ("euclidean", "dot", "cosine")


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    library = ctypes.CDLL(str(build_host_library("margin", tmp_path_factory.mktemp("margin"))))

    def thresholds(best, norm, error, radius, spread, padded, metric):
        out = np.empty_like(best)
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (best, norm, error)]
        floats = [ctypes.c_float(x) for x in (radius, spread)]
        library.margin_thresholds(
            len(best), *pointers, *floats, padded, METRICS.index(metric), ctypes.c_void_p(out.ctypes.data)
        )
        return out

    return thresholds


def triton_thresholds(best, norm, error, radius, spread, padded, metric, device):
    to = {"dtype": torch.float32, "device": device}
    best, norm, error = (torch.tensor(x, **to) for x in (best, norm, error))
    out = torch.empty_like(best)
    scalars = (torch.tensor([x], **to) for x in (radius, spread))
    threshold_kernel[(len(best),)](best, norm, error, out, *scalars, PADDED=padded, METRIC=metric)
    return out.cpu().numpy()


def inputs(seed):
    """Rows near codes, rows far from all, exact images, rounded ones, negative scores, what nothing is proved about."""
    random = np.random.default_rng(seed)
    count = 24
    norm = np.exp2(random.uniform(-10, 14, count)).astype(np.float32)
    error = np.where(random.random(count) < 0.2, 0, norm * np.exp2(random.uniform(-14, -6, count))).astype(np.float32)
    best = (norm * norm * random.uniform(-0.5, 0.5, count)).astype(np.float32)
    norm[:3], error[3:5], best[5] = (0.0, np.nan, 2.0**60), np.inf, 2.0**90
    return best, norm, error


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("padded", "radius", "spread"), [(16, 512.0, 0.1), (128, 3e4, 0.0), (576, 2.0**-8, 1e-6)])
def test_the_header_is_the_kernels_margin(header, metric, padded, radius, spread, device):
    best, norm, error = inputs(padded)
    expected = triton_thresholds(best, norm, error, radius, spread, padded, metric, device).astype(np.float64)
    got = header(best, norm, error, radius, spread, padded, metric).astype(np.float64)
    proved = np.isfinite(expected)
    assert proved.sum() > 15
    assert not (got[~proved] < np.inf).any(), "where nothing is proved every code is kept"
    # the margin itself, not the sum that it all but vanishes in, to what contraction and the sum's rounding may move it
    best, expected, got = best[proved].astype(np.float64), expected[proved], got[proved]
    last_place = np.spacing(np.abs(best).astype(np.float32)).astype(np.float64)
    assert (np.abs(got - expected) <= 1e-5 * (expected - best) + 2 * last_place).all()


def test_an_infinite_radius_keeps_every_code(header):
    best, norm, error = inputs(1)
    for metric in METRICS:
        assert not (header(best, norm, error, np.inf, 0.0, 64, metric) < np.inf).any()
