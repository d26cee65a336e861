"""Clocks and memory."""

import os
import sys

import pytest

from vqkernels.bench import memory, timing
from vqkernels.bench.cases import Case


def test_rounds_are_interleaved_and_bounded(monkeypatch):
    monkeypatch.setattr(timing, "_SAMPLE", 0.0)
    monkeypatch.setattr(timing, "fma_peak", lambda threads: 1e9)
    seen = []
    contenders = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    times, peak = timing.interleave(contenders, 1, budget=0.0, least=3, most=9)
    assert "".join(seen) == "abc" * 4  # the first, and three rounds
    assert [x.rounds for x in times.values()] == [3] * 3 and peak.median == 1e9
    seen.clear()
    timing.interleave(contenders, 1, budget=60.0, least=3, most=5)
    assert "".join(seen) == "abc" * 6


def test_quartiles():
    assert timing.summary([4.0]) == timing.Timing(4.0, 4.0, 4.0, 1)
    told = timing.summary([1.0, 2.0, 3.0, 4.0, 100.0])
    assert told.median == 3.0 and told.low < 3.0 < told.high


def test_the_peak_is_that_of_a_processor():
    pytest.importorskip("vqkernels._C")
    assert 1e8 < timing.fma_peak(1, 0.01) < 1e12


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_the_distance_matrix_is_seen_in_the_peer_and_absent_in_ours():
    assert sys.platform == "linux"
    case = Case("search", 4096, 2048, 8)  # one float32 matrix: 33.6 MB
    found = memory.measure([(case, "torch.addmm+argmin"), (case, "vqkernels")], threads=1)
    assert 30 < found[case, "torch.addmm+argmin"] < 50
    assert found[case, "vqkernels"] < 8
