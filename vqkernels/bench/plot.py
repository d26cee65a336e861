"""The report as one picture that needs no other text. Needs matplotlib."""

from pathlib import Path

from .cases import Case
from .report import TITLES, by_case, ours, ratio
from .run import Result


def draw(path: Path, results: list[Result], facts: dict[str, str]) -> None:
    """Time of every contender as a multiple of ours, one panel per kind of case.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    kinds = [(kind, [entry for entry in by_case(results) if entry[0].kind == kind]) for kind in TITLES]
    kinds = [(kind, groups) for kind, groups in kinds if groups]
    heights = [len(groups) + 2 for _, groups in kinds]
    figure = Figure(figsize=(10, 0.34 * sum(heights) + 1.5), layout="constrained")
    axes = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (kind, groups) in zip(axes, kinds, strict=True):
        _panel(axis, TITLES[kind], groups)
    versions = f"{facts['processor']}, {facts['threads']} threads, {facts['SIMD level']}, torch {facts['torch']}"
    figure.suptitle(
        f"Time as a multiple of vqkernels (right of the line: slower than ours)\n{versions}, "
        f"vqkernels {facts['vqkernels']} at {facts['commit']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _panel(axis, title: str, groups: list[tuple[Case, list[Result]]]) -> None:
    names = list(dict.fromkeys(x.contender for _, group in groups for x in group))
    for number, name in enumerate(names):
        points = []
        for height, (_, group) in enumerate(groups):
            found = next((x for x in group if x.contender == name), None)
            quotient = ratio(found, ours(group))
            if quotient is not None:
                points.append((quotient, height))
        if points:
            across, up = zip(*points, strict=True)
            axis.scatter(
                across, up, label=name, s=32, marker="os^vDP*Xh"[number % 9], color=f"C{number % 10}", zorder=3
            )
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    ticks = [x for x in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if axis.get_xlim()[0] <= x <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{x:g}x" for x in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(groups)), [case.label for case, _ in groups], fontsize=8)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(title, fontsize=9, loc="left")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
