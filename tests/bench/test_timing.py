"""Clocks and memory."""

import os
import sys
import time

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


def test_the_slow_run_in_few_rounds(monkeypatch):
    monkeypatch.setattr(timing, "_SAMPLE", 0.0)
    monkeypatch.setattr(timing, "_LONG", 0.002)
    monkeypatch.setattr(timing, "fma_peak", lambda threads: None)
    seen = []

    def slow():
        seen.append("s")
        time.sleep(0.005)

    contenders = {"fast": lambda: seen.append("f"), "slow": slow}
    times, peak = timing.interleave(contenders, 1, budget=60.0, least=3, most=6)
    assert "".join(seen) == "fs" * 3 + "f" * 4 and peak is None
    assert {name: x.rounds for name, x in times.items()} == {"fast": 6, "slow": 2}
    seen.clear()
    timing.interleave(contenders, 1, budget=60.0, least=3, most=3, known={"slow": 0.005, "fast": 1e-6})
    assert "".join(seen) == "ffsfsf"  # the long call that was made already is not made again


def test_quartiles():
    assert timing.summary([4.0]) == timing.Timing(4.0, 4.0, 4.0, 1)
    assert timing.summary([1.0, 3.0]) == timing.Timing(2.0, 1.5, 2.5, 2)  # never outside of what was measured
    told = timing.summary([1.0, 2.0, 3.0, 4.0, 100.0])
    assert told.median == 3.0 and told.low < 3.0 < told.high


def test_the_peak_is_that_of_a_processor(cpu_kernels):
    assert 1e8 < timing.fma_peak(1, 0.01) < 1e12


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_the_distance_matrix_is_seen_in_the_peer_and_absent_in_ours():
    assert sys.platform == "linux"
    case = Case("search", 4096, 2048, 8)  # one float32 matrix: 33.6 MB
    found = memory.measure([(case, "torch.addmm+argmin"), (case, "vqkernels")], threads=1)
    assert 30 < found[case, "torch.addmm+argmin"] < 50
    assert found[case, "vqkernels"] < 8
