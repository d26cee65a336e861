"""Our goals on two cores, and what was measured: every goal, met or not.

Only the cases of a full run count. Each figure says how many cases it is from.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .cases import Case, default_cases
from .entropies import PLAIN
from .run import Result

Group = tuple[Case, list[Result]]
_AT_PEAK = ((16384, 8192, 32), (16384, 8192, 256), (32768, 1024, 64))


@dataclass(frozen=True)
class Target:
    """One goal, the figure that decides it, and whether it was met."""

    what: str
    goal: str
    figure: str
    state: str


def targets(groups: Iterable[Group]) -> list[Target]:
    """All goals, in the order in which they were set."""
    known = set(default_cases())
    cases = [group for group in groups if group[0] in known]
    search = [group for group in cases if group[0].kind == "search"]
    training = [group for group in cases if group[0].kind == "training"]
    best = _ratios(search, "vqkernels", lambda x: x.competes)
    product = _ratios(search, "vqkernels", lambda x: x.contender == "torch.mm alone")
    peak = [_of_peak(group) for group in search if _shape(group) in _AT_PEAK and group[0].codebook == "gaussian"]
    faiss = _ratios(
        [g for g in search if g[0].dim in (4, 8)], "vqkernels", lambda x: x.contender == "FAISS IndexFlatL2"
    )
    lucidrains = _ratios(training, "vqkernels EMA", lambda x: x.contender == "lucidrains EMA")
    diffusers = _ratios(training, "vqkernels", lambda x: x.contender == "diffusers")
    entropy = _ratios([g for g in cases if g[0].kind == "entropy"], "vqkernels", lambda x: x.contender == PLAIN)
    return [
        _at_least("search: best peer / ours, geometric mean", _mean(best), 3.0, 2.2, len(best)),
        _at_least("search: best peer / ours, lowest", _lowest(best), 1.2, 1.0, len(best)),
        _at_least("search: bare torch.mm / ours, geometric mean", _mean(product), 2.0, None, len(product)),
        _at_least(
            "search: of the multiply-add peak, lowest of three shapes", _lowest(peak), 1.0, None, len(_real(peak))
        ),
        _at_least("search: FAISS / ours at D = 8 and 4, lowest", _lowest(faiss), 1.5, None, len(faiss)),
        _at_least(
            "training step: lucidrains EMA / ours by EMA, lowest", _lowest(lucidrains), 12.0, 8.0, len(lucidrains)
        ),
        _at_least("training step: diffusers / ours by gradient, lowest", _lowest(diffusers), 4.0, None, len(diffusers)),
        *(_vqvae(cases, size, goal) for size, goal in ((8192, 2.2), (512, None))),
        _memory(search + training),
        _wrong(cases),
        _at_least("entropy loss: plain PyTorch / ours, lowest", _lowest(entropy), 3.0, 1.0, len(entropy)),
        _entropy_memory(cases),
        *(_residual(cases, kind) for kind in ("residual", "residual training")),
    ]


def _shape(group: Group) -> tuple[int, int, int]:
    return group[0].rows, group[0].codebook_size, group[0].dim


def _seconds(results: list[Result], wanted: Callable[[Result], bool]) -> float | None:
    """The fastest contender among those wanted."""
    return min((x.timing.median for x in results if x.timing and wanted(x)), default=None)


def _ratios(groups: list[Group], ours: str, other: Callable[[Result], bool]) -> list[float]:
    pairs = [(_seconds(r, other), _seconds(r, lambda x: x.ours and x.contender == ours)) for _, r in groups]
    return [theirs / mine for theirs, mine in pairs if theirs and mine]


def _of_peak(group: Group) -> float | None:
    mine = next((x for x in group[1] if x.contender == "vqkernels" and x.timing), None)
    if mine is None or mine.timing is None or not mine.peak:
        return None
    return mine.case.operations / mine.timing.median / mine.peak


def _real(values: Iterable[float | None]) -> list[float]:
    return [x for x in values if x is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _real(values)
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None


def _lowest(values: Iterable[float | None]) -> float | None:
    return min(_real(values), default=None)


def _at_least(what: str, figure: float | None, goal: float, floor: float | None, shapes: int) -> Target:
    said = f">= {goal:g}x" + (f" (floor {floor:g}x)" if floor is not None else "")
    if figure is None:
        return Target(what, said, "-", "not measured")
    state = "met" if figure >= goal else "missed"
    if floor is not None and figure < goal:
        state = "missed, above the floor" if figure >= floor else "missed, BELOW THE FLOOR"
    return Target(what, said, f"{figure:.2f}x over {shapes} shape{'s' * (shapes != 1)}", state)


def _vqvae(cases: list[Group], size: int, goal: float | None) -> Target:
    found = [group for group in cases if group[0].kind == "vqvae" and group[0].codebook_size == size]
    figure = _lowest(_ratios(found, "vqkernels", lambda x: x.contender == "one-hot layer"))
    what = f"VQ-VAE step at K={size}: one-hot layer / ours"
    if goal is not None:
        return _at_least(what, figure, goal, None, len(found))
    return Target(what, "none", "-" if figure is None else f"{figure:.2f}x", "no goal" if figure else "not measured")


def _residual(cases: list[Group], kind: str) -> Target:
    found = [group for group in cases if group[0].kind == kind and group[0].dim == 128]
    figures = _ratios(found, "vqkernels", lambda x: x.contender == "lucidrains")
    return _at_least(f"{kind}, 8 levels: lucidrains / ours", _lowest(figures), 8.0, 5.0, len(figures))


def _memory(groups: list[Group]) -> Target:
    """O((N + K) D) scratch memory: two float32 copies and 1 MB, and in a training step also its gradients."""
    worst: float | None = None
    for case, results in groups:
        copies = 8 if case.kind == "search" else 16  # bytes per element of z and of the codebook
        limit = copies * (case.rows + case.codebook_size) * case.dim / 1e6 + 1
        for x in results:
            if x.ours and x.megabytes is not None:
                worst = max(worst or 0.0, x.megabytes / limit)
    what = "memory: of 8 (N + K) D bytes + 1 MB (training step: 16), largest"
    if worst is None:
        return Target(what, "<= 1x", "-", "not measured")
    return Target(what, "<= 1x", f"{worst:.2f}x", "met" if worst <= 1 else "missed")


def _entropy_memory(cases: list[Group]) -> Target:
    """Our peak over that of plain PyTorch, which holds several N x K matrices."""
    shares = []
    for case, results in cases:
        held = {x.contender: x.megabytes for x in results if x.megabytes is not None}
        if case.kind == "entropy" and held.get(PLAIN) and "vqkernels" in held:
            shares.append(held["vqkernels"] / (held[PLAIN] or 1.0))
    what, goal = "entropy loss: of the peak memory of plain PyTorch, largest", "<= 1/20"
    if not shares:
        return Target(what, goal, "-", "not measured")
    return Target(what, goal, f"1/{1 / max(shares):.0f}", "met" if max(shares) <= 1 / 20 else "missed")


def _wrong(cases: list[Group]) -> Target:
    counted = [x for _, results in cases for x in results if x.ours and x.wrong is not None]
    wrong, checked = sum(x.wrong or 0 for x in counted), sum(x.checked for x in counted)
    if not counted:
        return Target("wrong indices", "0", "-", "not measured")
    return Target("wrong indices", "0", f"{wrong} of {checked} checked", "met" if wrong == 0 else "missed")
