"""Plots of a report, and their two forms: SVG that takes the colors of its page, and PNG on white. Needs matplotlib."""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK = "#010203"  # lines and letters; in the SVG it becomes the page's own color
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # distinct for the color-blind, on white and on black
STYLE: Any = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], *, across: str, up: str) -> Figure:
    """Lines of points (x, y) by name."""
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(3.0)
        for number, (name, points) in enumerate(lines.items()):
            if points:
                x, y = zip(*points, strict=True)
                axis.plot(x, y, color=COLORS[number % len(COLORS)], label=name, linewidth=1.6, marker=".")
        axis.set_xlabel(across)
        axis.set_ylabel(up)
        axis.grid(alpha=0.25)
        axis.legend()
        return figure


def bars(parts: Mapping[str, Sequence[float]], rows: Sequence[str], *, across: str) -> Figure:
    """Horizontal bars, one for each row; the parts of a row follow one another, and their sum is at the end."""
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(0.9 + 0.42 * len(rows))
        left = [0.0] * len(rows)
        for number, (name, values) in enumerate(parts.items()):
            axis.barh(rows, values, left=left, height=0.62, color=COLORS[number % len(COLORS)], label=name)
            left = [a + b for a, b in zip(left, values, strict=True)]
        for height, total in enumerate(left):
            axis.text(total, height, f" {total:.2f}", va="center", ha="left")
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.set_xlabel(across)
        if len(parts) > 1:
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts))
        return figure


def svg(figure: Figure) -> str:
    """An `<svg>` element for a page: it scales with its column and names no other document."""
    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", text)  # inside a page they are known
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    own = hashlib.sha256(text.encode()).hexdigest()[:8]  # names are unique in the page, not only in the figure
    text = re.sub(r'\bid="', f'id="{own}-', text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{own}-", text).replace("xlink:href", "href")


def png(figure: Figure) -> bytes:
    """The figure on white."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _figure(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, figure.subplots()
