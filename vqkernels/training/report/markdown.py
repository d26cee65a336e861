"""A document as Markdown, with its pictures as PNG files beside it."""

import re
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
from vqkernels.training.report.plots import png


def write_markdown(document: Document, path: Path) -> None:
    """Write the text to a file, and its pictures into the same folder."""
    parts = [f"# {_plain(document.title)}", _plain(document.summary)]
    parts += [_block(block, path.parent) for block in document.blocks]
    write_atomically(path, lambda file: file.write(("\n\n".join(parts) + "\n").encode()))


def _block(block: Block, folder: Path) -> str:
    match block:
        case Heading(text):
            return f"## {_plain(text)}"
        case Paragraph(text, strong):
            return f"**{_plain(text)}**" if strong else _plain(text)
        case Listing(text):
            return f"```\n{text}\n```"
        case Table():
            return _table(block)
        case Picture():
            return _image(folder, block.name, block.png(), block.caption)
        case Gallery(pictures):
            return "\n\n".join(_block(picture, folder) for picture in pictures)
        case Plot(name, figure, caption):
            return _image(folder, name, png(figure), caption)


def _table(table: Table) -> str:
    rows = [
        table.header,
        tuple("---" if i == 0 or len(table.header) == 2 else "---:" for i in range(len(table.header))),
    ]
    lines = ["| " + " | ".join(row) + " |" for row in ((*map(_plain, rows[0]),), rows[1])]
    lines += ["| " + " | ".join(map(_plain, row)) + " |" for row in table.rows]
    return "\n".join(lines) + (f"\n\n{_plain(table.caption)}" if table.caption else "")


def _image(folder: Path, name: str, content: bytes, caption: str) -> str:
    write_atomically(folder / f"{name}.png", lambda file: file.write(content))
    return f"![{_plain(caption)}]({name}.png)\n\n{_plain(caption)}"


def _plain(text: str) -> str:
    """The text on one line, and none of its characters read as markup."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)
