"""Times: interleaved rounds in one process, and the multiply-add peak of the machine measured between them.

In every round each contender runs once (a short one several times in a row, for `_SAMPLE` seconds), and the peak is
measured once. So other work of the machine affects all of them alike. A pause before each lets the threads of the one
before go to sleep. A contender that takes many times as long as the fastest runs in two rounds only, which leaves the
time for close figures. Figures are medians over the rounds, with quartiles.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..backends import cpu

_SLOW = 8.0  # times the fastest contender: one that is slower, and longer than _LONG, runs in _FEW rounds alone
_LONG = 0.3  # seconds
_FEW = 2
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

    def __str__(self) -> str:
        """Milliseconds."""
        digits = 1 if self.median >= 0.01 else 3
        low, middle, high = (f"{1e3 * x:.{digits}f}" for x in (self.low, self.median, self.high))
        return f"{middle} [{low}, {high}]"


def summary(samples: list[float]) -> Timing:
    """Median and quartiles; with fewer than two samples all three are the same."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return Timing(middle, low, high, len(samples))


def fma_peak(threads: int, seconds: float = _PEAK) -> float | None:
    """Float32 operations per second of independent multiply-adds on `threads` threads at once; None: no library."""
    if cpu.load() is not None:
        return None
    with ThreadPoolExecutor(threads) as pool:
        return sum(rate or 0.0 for rate in pool.map(cpu.fma_rate, [seconds] * threads))


def seconds_per_call(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def take_turns(
    contenders: dict[str, Callable[[], Any]],
    rounds: dict[str, int],
    clock: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, list[float]]:
    """Samples of everyone, who runs once in each of the rounds that are given by name.

    Args:
        clock: runs a function and gives its time; the default one gives seconds of wall-clock.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(max(rounds.values(), default=0)):
        for name, function in contenders.items():
            if turn < rounds[name]:
                samples[name].append(clock(function) if clock else seconds_per_call(function, 1))
    return samples


def interleave(
    contenders: dict[str, Callable[[], Any]],
    threads: int,
    budget: float,
    least: int,
    most: int,
    known: dict[str, float] | None = None,
) -> tuple[dict[str, Timing], Timing | None]:
    """Time all contenders in rounds, as many as `budget` seconds allow between `least` and `most`.

    Args:
        known: seconds of a first call that was already made. If it was long, no other call comes before the rounds.

    Returns:
        The times by name, and the peak in operations per second, None if it cannot be measured.
    """
    begun = time.perf_counter()
    long = {name: seconds for name, seconds in (known or {}).items() if seconds > _LONG and name in contenders}
    # The others run once more before the rounds, to learn how long they take.
    once = {name: long.get(name) or seconds_per_call(function, 1) for name, function in contenders.items()}
    calls = {name: max(1, round(_SAMPLE / max(seconds, 1e-6))) for name, seconds in once.items()}
    slow = {name for name, seconds in once.items() if seconds > max(_LONG, _SLOW * min(once.values()))}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: list[float] = []
    round_time = 0.0
    for number in range(most):
        if number >= least and time.perf_counter() - begun + round_time > budget:
            break
        start = time.perf_counter()
        for name, function in contenders.items():
            if name in slow and len(samples[name]) >= _FEW:
                continue
            time.sleep(_PAUSE)
            samples[name].append(seconds_per_call(function, calls[name]))
        time.sleep(_PAUSE)
        peak = fma_peak(threads)
        if peak is not None:
            peaks.append(peak)
        round_time = time.perf_counter() - start
    return {name: summary(values) for name, values in samples.items()}, summary(peaks) if peaks else None
