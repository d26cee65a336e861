"""Times of GPU work: contenders take turns, each round starts with a cold L2 cache, medians with quartiles."""

from collections.abc import Callable
from typing import Any

import torch

from .timing import summary, take_turns

FLUSH_BYTES = 256 << 20  # more than any L2 cache
SECONDS = 0.4  # what the rounds of one contender may take
MOST_ROUNDS = 25


def times(
    contenders: dict[str, Callable[[], Any]], device: torch.device, rehearsal: bool = False
) -> dict[str, dict[str, Any]]:
    """For each {"ms": median, "quartiles": [low, high], "rounds", "peak MB"}, or {"absent": why}.

    The peak is what one call allocates above what was there. In a rehearsal everyone runs once and no time is kept.
    """
    found: dict[str, dict[str, Any]] = {}
    rough: dict[str, float] = {}
    for name, function in contenders.items():
        try:
            function()  # compiles
            if rehearsal:
                found[name] = {"rehearsed": True}
                continue
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            rough[name] = max(_milliseconds(function), 1e-3)
            found[name] = {"peak MB": round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)}
        except torch.OutOfMemoryError:
            found[name] = {"absent": "out of memory"}
        except Exception as error:  # a peer's own: it is reported, and the others go on
            found[name] = {"absent": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if rehearsal:
        return found
    spare = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def cold(function: Callable[[], Any]) -> float:
        spare.zero_()
        return _milliseconds(function)

    rounds = {name: min(MOST_ROUNDS, max(3, int(SECONDS * 1e3 / ms))) for name, ms in rough.items()}
    samples = take_turns({name: contenders[name] for name in rough}, rounds, cold)
    for name, timing in ((name, summary(values)) for name, values in samples.items()):
        quartiles = [round(timing.low, 4), round(timing.high, 4)]
        found[name] |= {"ms": round(timing.median, 4), "quartiles": quartiles, "rounds": timing.rounds}
    return found


def _milliseconds(function: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def replayed(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function as a CUDA graph, or as it is on a CPU. What it returns is overwritten by every replay."""
    if device.type != "cuda":
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
