"""Reports: one file that fetches nothing, everything given by a user escaped, the same numbers in both forms."""

import re
from html.parser import HTMLParser

import pytest
import torch

from vqkernels.training.report import (
    Document,
    Gallery,
    Heading,
    Listing,
    Paragraph,
    Picture,
    Plot,
    Table,
    to_html,
    write_markdown,
)

plots = pytest.importorskip("vqkernels.training.report.plots")
NASTY = "<script>alert(\"x\")</script> & 'quoted' | `code`"
FETCHING = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction", "xlink:href"}
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Tags, what they would fetch, names, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.names: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in FETCHING]
        self.names += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def everything() -> Document:
    grid = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    return Document(
        f"Title {NASTY}",
        f"Summary {NASTY}",
        (
            Heading(f"Heading {NASTY}"),
            Paragraph(f"Paragraph {NASTY}"),
            Paragraph("Strong", strong=True),
            Listing("vqkernels compare --data 'a <b>'"),
            Table(("name", "value", "more"), ((NASTY, "1.25", "–"), ("b", "2.50", "3.75")), f"Caption {NASTY}"),
            Picture("grid", grid, f"Picture {NASTY}"),
            Gallery((Picture("left", grid[:1], "left"), Picture("right", grid, "right"))),
            Plot("lines", plots.curves({NASTY: [(0, 1), (1, 2)]}, across="steps", up="bits"), f"Plot {NASTY}"),
            Plot("bars", plots.bars({"a": [1.0, 2.0], "b": [0.5, 0.5]}, ["x", "y"], across="bits"), "Bars"),
        ),
    )


def check_self_contained(text: str) -> Page:
    """Nothing is fetched, nothing runs, and the page is whole."""
    page = Page(text)
    assert page.open == []
    assert [url for url in page.fetched if not url.startswith(("data:image/png;base64,", "#"))] == []
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert not re.search(r"<[^>]*\son\w+=", text)
    assert len(page.names) == len(set(page.names)), "two elements have one name"
    return page


def test_the_page_is_one_file_that_fetches_nothing():
    page = check_self_contained(to_html(everything()))
    assert page.tags.count("img") == 3 and page.tags.count("svg") == 2


def test_references_inside_the_page_are_found():
    text = to_html(everything())
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert used and {a or b for a, b in used} <= set(Page(text).names)


def test_what_users_give_is_escaped():
    text = to_html(everything())
    assert "<script" not in text and "&lt;script&gt;" in text
    assert 'alt="Picture &lt;script' in text


def test_light_and_dark_without_javascript():
    text = to_html(everything())
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text
    assert "currentColor" in text and plots.INK not in text


def test_markdown_has_the_same_cells_and_its_pictures_beside_it(tmp_path):
    write_markdown(everything(), tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "| b | 2.50 | 3.75 |" in text
    assert "<script" not in text and text.count(r"\|") >= 2
    named = re.findall(r"!\[[^\n]*\]\((\w+\.png)\)", text)
    assert sorted(named) == ["bars.png", "grid.png", "left.png", "lines.png", "right.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in named)


def test_the_report_is_the_same_twice():
    torch.manual_seed(0)
    first = to_html(everything())
    torch.manual_seed(0)
    assert to_html(everything()) == first
