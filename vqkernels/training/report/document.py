"""What a report consists of. Every text is plain: whoever writes it out escapes it."""

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str
    strong: bool = False  # what the reader should not miss


@dataclass(frozen=True)
class Listing:
    """Commands, shown as they are typed."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A grid of images (C, H, W) uint8; `name` is that of its file, where it gets one."""

    name: str
    grid: Tensor
    caption: str

    def png(self) -> bytes:
        array = self.grid.permute(1, 2, 0).contiguous().numpy()
        buffer = io.BytesIO()
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, as far as there is room."""

    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Plot:
    """A figure of matplotlib, whose lines and letters have the color `plots.INK`."""

    name: str
    figure: Any
    caption: str


Block = Heading | Paragraph | Listing | Table | Picture | Gallery | Plot


@dataclass(frozen=True)
class Document:
    title: str
    summary: str
    blocks: tuple[Block, ...]
