"""What the pages show of committed runs."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def shown(marks: tuple[str, str]) -> str:
    """The text between two marks of the one page that has them."""
    texts = [page.read_text() for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))]
    (text,) = [text for text in texts if f"\n{marks[0]}\n" in text]
    return text.partition(f"\n{marks[0]}\n")[2].partition(marks[1])[0].strip()
