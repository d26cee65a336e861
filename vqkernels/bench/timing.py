"""Clocks: interleaved rounds in one process, and the multiply-add peak of the machine measured between them.

In every round each contender runs once (a short one several times in a row, to fill `_SAMPLE` seconds) and so does
the peak, so that whatever else the machine does falls on all of them. A pause before each lets the threads of the one
before go to sleep. Figures are medians over the rounds, with quartiles.
"""

import importlib
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

_SAMPLE = 0.01  # seconds that one sample lasts at least
_PAUSE = 0.003
_PEAK = 0.02  # seconds of multiply-adds per round


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def summary(samples: list[float]) -> Timing:
    """Median and quartiles; with fewer than two samples all three are the same."""
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return Timing(middle, low, high, len(samples))


def fma_peak(threads: int, seconds: float = _PEAK) -> float | None:
    """Float32 operations per second of independent multiply-adds on `threads` threads at once; None without `_C`."""
    try:
        rate = importlib.import_module("vqkernels._C").fma_rate
    except (ImportError, AttributeError):  # not built, or built before the measurement existed
        return None
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(rate, [seconds] * threads))


def seconds_per_call(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def interleave(
    contenders: dict[str, Callable[[], Any]], threads: int, budget: float, least: int, most: int
) -> tuple[dict[str, Timing], Timing | None]:
    """Time everyone in rounds, as many as `budget` seconds allow between `least` and `most`.

    Returns:
        The times by name, and the peak in operations per second where it can be measured.
    """
    begun = time.perf_counter()
    calls = dict.fromkeys(contenders, 1)
    for name, function in contenders.items():  # once more before it counts, to learn how long it takes
        calls[name] = max(1, round(_SAMPLE / max(seconds_per_call(function, 1), 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: list[float] = []
    round_time = 0.0
    for number in range(most):
        if number >= least and time.perf_counter() - begun + round_time > budget:
            break
        start = time.perf_counter()
        for name, function in contenders.items():
            time.sleep(_PAUSE)
            samples[name].append(seconds_per_call(function, calls[name]))
        time.sleep(_PAUSE)
        peak = fma_peak(threads)
        if peak is not None:
            peaks.append(peak)
        round_time = time.perf_counter() - start
    return {name: summary(values) for name, values in samples.items()}, summary(peaks) if peaks else None
