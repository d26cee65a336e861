"""Reports of what was trained: a document of blocks, written as one HTML file, or as Markdown and pictures."""

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
from vqkernels.training.report.html import to_html, write_html
from vqkernels.training.report.markdown import write_markdown

__all__ = [
    "Block",
    "Document",
    "Gallery",
    "Heading",
    "Listing",
    "Paragraph",
    "Picture",
    "Plot",
    "Table",
    "to_html",
    "write_html",
    "write_markdown",
]
