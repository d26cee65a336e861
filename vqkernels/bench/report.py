"""The report: one line per case, the figures of every contender, and a CSV with machine, versions and commit."""

import csv
import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from .cases import Case
from .run import Result

TITLES = {
    "search": "Search: the index of the nearest code of every row",
    "training": "Training step of the layer: forward, backward, codebook update",
    "residual": "Residual quantization in eval: indices and quantized rows of all levels",
    "residual training": "Training step of the residual layer: forward, backward, moving averages of all levels",
    "entropy": "Entropy loss: both entropies of soft assignments and their gradients",
    "vqvae": "Training step of a VQ-VAE: forward, backward, Adam",
}
_SUMMARY = (
    "shape",
    "ours, ms [quartiles]",
    "GFLOP/s (of peak)",
    "filter decided",
    "best peer, ms",
    "ratio",
    "of torch.mm",
    "MB ours / best peer",
    "wrong ours / worst peer",
    "where we lose",
)
_SHORT = ("", "shape", "ours, ms", "best peer, ms", "ratio", "of torch.mm", "where we lose")
_MEANS = ("time / ours over all shapes", "geometric mean", "lowest", "shapes")
_DETAILS = ("contender", "ms [quartiles]", "rounds", "time / ours", "GFLOP/s", "MB", "wrong / checked", "computes")


def by_case(results: Iterable[Result]) -> list[tuple[Case, list[Result]]]:
    return [(case, list(group)) for case, group in groupby(results, key=lambda x: x.case)]


def ours(group: list[Result]) -> Result | None:
    """Our entry of a case. For a training step it is the one with moving averages, as most codebooks have."""
    return next((x for x in group if x.ours and x.timing), None)


def best_peer(group: list[Result]) -> Result | None:
    timed = [x for x in group if x.competes and x.timing]
    return min(timed, key=lambda x: x.timing.median if x.timing else math.inf, default=None)


def ratio(other: Result | None, mine: Result | None) -> float | None:
    """How many times longer the other takes."""
    if other is None or mine is None or other.timing is None or mine.timing is None:
        return None
    return other.timing.median / mine.timing.median


def losses(group: list[Result]) -> list[str]:
    """Every contender that is faster than ours or needs less memory."""
    mine = ours(group)
    found = []
    for other in group:
        quotient = ratio(other, mine)
        if other.ours or quotient is None or mine is None or other.contender == "no quantizer":
            continue
        if quotient < 1:
            found.append(f"{other.contender} is {1 / quotient:.2f}x faster")
        if other.competes and None not in (other.megabytes, mine.megabytes):
            spare = (mine.megabytes or 0) - (other.megabytes or 0)
            if spare > 1:
                found.append(f"{other.contender} needs {spare:.0f} MB less")
    return found


def text(results: list[Result], facts: dict[str, str]) -> str:
    """The whole report in Markdown."""
    lines = ["# vqkernels bench", ""]
    lines += [", ".join(f"{label} {value}" for label, value in facts.items()), ""]
    peaks = [x.peak for x in results if x.peak]
    if peaks:
        low, high = min(peaks) / 1e9, max(peaks) / 1e9
        lines += [f"Float32 multiply-add peak, measured between the rounds: {low:.0f} to {high:.0f} GFLOP/s.", ""]
    lines += [
        "Contenders interleaved in one process on equal threads, indices checked first. Times are medians with "
        "quartiles; GFLOP/s counts 2NKD; MB is the peak of one call above its inputs; wrong counts indices that differ "
        "from the contract on a sample of rows and on every row in dispute. Data are float32; codebooks are Gaussian "
        "unless named.",
        "",
    ]
    lines += ["## In short", "", short(results, facts), ""]
    for kind, title in TITLES.items():
        groups = [(case, group) for case, group in by_case(results) if case.kind == kind]
        if not groups:
            continue
        lines += [f"## {title}", "", *markdown(_SUMMARY, [_summary(case, group) for case, group in groups]), ""]
        lines += [*markdown(_MEANS, _means([group for _, group in groups])), ""]
    lines += ["## Every contender", ""]
    for case, group in by_case(results):
        lines += [
            f"### {case.kind}, {case.label}",
            "",
            *markdown(_DETAILS, [_detail(x, ours(group)) for x in group]),
            "",
        ]
    return "\n".join(lines)


def short(results: list[Result], facts: dict[str, str]) -> str:
    """The table of docs/speed.md: one line per case, losing ones included, and the machine and commit."""
    rows = []
    for case, group in by_case(results):
        mine, peer = ours(group), best_peer(group)
        product = next((x for x in group if x.contender == "torch.mm alone"), None)
        quotients = [f"{x:.2f}x" if x else "-" for x in (ratio(peer, mine), ratio(product, mine))]
        theirs = f"{peer.contender}, {_middle(peer)}" if peer else "-"
        rows.append([case.kind, case.label, _middle(mine), theirs, *quotients, "; ".join(losses(group)) or "nowhere"])
    machine = f"{facts['processor']}, {facts['threads']} threads, {facts['SIMD level']}, torch {facts['torch']}"
    return "\n".join([f"{machine}, commit {facts['commit']}; medians.", "", *markdown(_SHORT, rows)])


def _middle(result: Result | None) -> str:
    if result is None or result.timing is None:
        return "-"
    return f"{1e3 * result.timing.median:.{1 if result.timing.median >= 0.01 else 2}f}"


def _summary(case: Case, group: list[Result]) -> list[str]:
    mine, peer = ours(group), best_peer(group)
    product = next((x for x in group if x.contender == "torch.mm alone"), None)
    if mine is None:
        return [case.label, *["-"] * (len(_SUMMARY) - 1)]
    wrong = [x.wrong for x in group if x.competes and x.wrong is not None]
    to_best, to_product = ratio(peer, mine), ratio(product, mine)
    return [
        case.label,
        str(mine.timing),
        _rate(mine, with_peak=True),
        "-" if mine.decided is None else f"{mine.decided:.2%}",
        f"{peer.contender}, {peer.timing}" if peer else "-",
        f"{to_best:.2f}x" if to_best else "-",
        f"{to_product:.2f}x" if to_product else "-",
        f"{_megabytes(mine)} / {_megabytes(peer)}",
        f"{'-' if mine.wrong is None else mine.wrong} / {max(wrong) if wrong else '-'}",
        "; ".join(losses(group)) or "nowhere",
    ]


def _means(groups: list[list[Result]]) -> list[list[str]]:
    """Geometric mean and lowest of the ratios to the best peer of each shape, and to every contender."""
    ratios = {"best peer": [ratio(best_peer(group), ours(group)) for group in groups]}
    for group in groups:
        for other in group:
            if other is not ours(group):
                ratios.setdefault(other.contender, []).append(ratio(other, ours(group)))
    rows = []
    for name, all_of_them in ratios.items():
        known = [x for x in all_of_them if x]
        if known:
            mean = math.exp(sum(map(math.log, known)) / len(known))
            rows.append([name, f"{mean:.2f}x", f"{min(known):.2f}x", str(len(known))])
    return rows


def _detail(result: Result, mine: Result | None) -> list[str]:
    if result.timing is None:
        return [result.contender, f"unavailable: {result.problem}", *["-"] * 5, result.computes]
    quotient = ratio(result, mine)
    return [
        result.contender,
        str(result.timing),
        str(result.timing.rounds),
        f"{quotient:.2f}" if quotient else "-",
        _rate(result),
        _megabytes(result),
        "-" if result.wrong is None else f"{result.wrong} / {result.checked}",
        result.computes,
    ]


def markdown(head: Iterable[str], rows: Iterable[list[str]], *, padded: bool = True) -> list[str]:
    """The lines of a table; padded, its columns are aligned in the source too."""
    cells = [list(head), *rows]
    if not padded:
        first = "|" + "|".join(f" {x} " if x else " " for x in cells[0]) + "|"
        return [first, "|" + "---|" * len(cells[0]), *("| " + " | ".join(row) + " |" for row in cells[1:])]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def put(path: Path, marks: tuple[str, str], text: str | None = None) -> None:
    """Puts `text` between the marks of a file; without a text, only sees that the marks are there.

    Raises:
        ValueError: they are not.
    """
    before, mark, rest = (path.read_text() if path.is_file() else "").partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (mark and end):
        raise ValueError(f"{path} has no line '{marks[0]}' followed by a line '{marks[1]}'")
    if text is not None:
        path.write_text(f"{before}{mark}\n{text.rstrip()}\n{end}{after}")


def _rate(result: Result, *, with_peak: bool = False) -> str:
    if result.timing is None or result.case.kind != "search":
        return "-"
    rate = result.case.operations / result.timing.median
    return f"{rate / 1e9:.0f}" + (f" ({rate / result.peak:.2f})" if with_peak and result.peak else "")


def _megabytes(result: Result | None) -> str:
    return "-" if result is None or result.megabytes is None else f"{result.megabytes:.0f}"


def write_csv(path: Path, results: list[Result], facts: dict[str, str]) -> None:
    """One line per case and contender, with columns for machine, versions and commit."""
    with path.open("w", newline="") as stream:
        writer: csv.DictWriter[str] | None = None
        for x in results:
            timing = x.timing
            rate = x.case.operations / timing.median if timing and x.case.kind == "search" else None
            line = {
                "kind": x.case.kind,
                "rows": x.case.rows,
                "codebook_size": x.case.codebook_size,
                "dim": x.case.dim,
                "codebook": x.case.codebook,
                "levels": x.case.levels,
                "contender": x.contender,
                "computes": x.computes,
                "ours": int(x.ours),
                "median_ms": _number(1e3 * timing.median if timing else None),
                "low_quartile_ms": _number(1e3 * timing.low if timing else None),
                "high_quartile_ms": _number(1e3 * timing.high if timing else None),
                "rounds": timing.rounds if timing else 0,
                "gflops": _number(rate / 1e9 if rate else None),
                "peak_gflops": _number(x.peak / 1e9 if x.peak else None),
                "megabytes": _number(x.megabytes),
                "wrong": "" if x.wrong is None else x.wrong,
                "checked": x.checked,
                "filter_decided": _number(x.decided),
                "problem": x.problem,
                **facts,
            }
            if writer is None:
                writer = csv.DictWriter(stream, list(line))
                writer.writeheader()
            writer.writerow(line)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
