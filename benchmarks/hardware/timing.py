"""Times of GPU work: contenders take turns, each round starts with a cold L2 cache, medians with quartiles.

In a rehearsal every contender runs once and no time is kept.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.hardware.setting import Setting

FLUSH_BYTES = 256 << 20  # more than any L2 cache
SECONDS = 0.4  # what the rounds of one contender may take
MOST_ROUNDS = 25


def times(setting: Setting, contenders: dict[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
    """For each {"ms": median, "quartiles": [low, high], "rounds", "peak MB"}, or {"absent": why}.

    The peak is what one call allocates above what was there.
    """
    told: dict[str, dict[str, Any]] = {}
    ready: dict[str, Callable[[], Any]] = {}
    for name, function in contenders.items():
        try:
            told[name] = _first(setting, function)
            ready[name] = function
        except torch.OutOfMemoryError:
            told[name] = {"absent": "out of memory"}
        except Exception as error:  # a peer's own: it is told, and the others go on
            told[name] = {"absent": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    if setting.dry:
        return told
    spare = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=setting.device)
    samples: dict[str, list[float]] = {name: [] for name in ready}
    rounds = {name: min(MOST_ROUNDS, max(3, int(SECONDS * 1e3 / told[name]["first ms"]))) for name in ready}
    for turn in range(max(rounds.values(), default=0)):
        for name, function in ready.items():
            if turn < rounds[name]:
                spare.zero_()
                samples[name].append(_milliseconds(function))
    for name, values in samples.items():
        low, middle, high = statistics.quantiles(values, n=4)
        del told[name]["first ms"]
        told[name] |= {"ms": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)], "rounds": len(values)}
    return told


def _first(setting: Setting, function: Callable[[], Any]) -> dict[str, Any]:
    """Compile and warm up; peak memory and a rough time of the second call."""
    if setting.dry:
        function()
        return {"rehearsed": True}
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rough = _milliseconds(function)
    return {"first ms": max(rough, 1e-3), "peak MB": round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)}


def _milliseconds(function: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def replayed(setting: Setting, function: Callable[[], Any]) -> Callable[[], Any]:
    """The function as a CUDA graph; called plainly in a rehearsal. What it returns is overwritten by every replay."""
    if setting.device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay() -> Any:
        graph.replay()
        return results

    return replay
