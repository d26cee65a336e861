"""A document as one HTML file: pictures inside it, no script, nothing fetched, light and dark as the reader has it."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from vqkernels.training.checkpoint import write_atomically
from vqkernels.training.report.document import (
    Block,
    Document,
    Gallery,
    Heading,
    Listing,
    Paragraph,
    Picture,
    Plot,
    Table,
)
from vqkernels.training.report.plots import svg

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --line: #d9dce1; --paper: #fcfcfa; --tint: #eef1f4;
        --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --soft: #9aa2b1; --line: #3a3f47; --paper: #16181c; --tint: #22262c; --mark: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 58rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; }
h2 { margin: 2.75rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.25rem; }
p { margin: .75rem 0; max-width: 46rem; }
.summary { color: var(--soft); font-size: 1.05rem; }
.strong { padding: .6rem 1rem; border-left: 3px solid var(--mark); background: var(--tint); }
pre { padding: .75rem 1rem; overflow-x: auto; background: var(--tint); border-radius: 4px; font-size: .85rem; }
.scroll { overflow-x: auto; margin: 1.25rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; padding-top: .5rem; text-align: left; color: var(--soft); font-size: .85rem; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.text td, .text th { text-align: left; }
figure { margin: 1.25rem 0; }
figcaption { margin-top: .4rem; color: var(--soft); font-size: .85rem; }
figure img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 3px; }
figure svg { display: block; width: 100%; max-width: 46rem; height: auto; font-family: inherit; }
.gallery { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: flex-start; }
.gallery figure { flex: 0 1 auto; max-width: 27.5rem; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser refuses whatever would be fetched


def to_html(document: Document) -> str:
    """The whole page."""
    body = "\n".join(_block(block) for block in document.blocks)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(document.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(document.title)}</h1>
<p class="summary">{escape(document.summary)}</p>
{body}
</body>
</html>
"""


def write_html(document: Document, path: Path) -> None:
    """Write the page to a file."""
    write_atomically(path, lambda file: file.write(to_html(document).encode()))


def _block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Paragraph(text, strong):
            return f'<p class="strong">{escape(text)}</p>' if strong else f"<p>{escape(text)}</p>"
        case Listing(text):
            return f"<pre>{escape(text)}</pre>"
        case Table():
            return _table(block)
        case Picture():
            return _picture(block)
        case Gallery(pictures):
            return '<div class="gallery">\n' + "\n".join(map(_picture, pictures)) + "\n</div>"
        case Plot(_, figure, caption):
            return f"<figure>\n{svg(figure)}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _table(table: Table) -> str:
    kind = ' class="text"' if len(table.header) == 2 else ""  # names and their meaning
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    rows = "\n".join(_row(row, "td") for row in table.rows)
    return (
        f'<div class="scroll"><table{kind}>{caption}\n<thead>{_row(table.header, "th")}</thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _picture(picture: Picture) -> str:
    data, caption = base64.b64encode(picture.png()).decode(), escape(picture.caption)
    _, height, width = picture.grid.shape
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}" width="{width}" height="{height}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
