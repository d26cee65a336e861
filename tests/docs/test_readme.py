"""README.md: its first screen, its length, its one figure; and the links of all pages."""

import csv
import re
from pathlib import Path

import pytest

import vqkernels

ROOT = Path(vqkernels.__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FIRST_SCREEN = "\n".join(README.splitlines()[:22])


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, flags=re.M)}


def test_the_first_screen_has_the_installation_an_example_and_a_figure():
    assert "\npip install ." in FIRST_SCREEN
    (example,) = re.findall(r"```python\n(.*?)```", FIRST_SCREEN, flags=re.S)
    assert len([line for line in example.splitlines() if line.strip()]) == 5
    assert re.search(r"takes [\d.]+ ms", FIRST_SCREEN)


def test_the_figure_is_that_of_the_committed_run():
    found = re.search(
        r"\(N=(?P<N>\d+) rows, K=(?P<K>\d+) codes, D=(?P<D>\d+) channels\) takes (?P<ours>[\d.]+) ms.*?"
        r"takes (?P<peer>[\d.]+) ms: (?P<ratio>[\d.]+)x.*?Conditions: (?P<processor>.*?), (?P<threads>\d+) threads, "
        r"SIMD level (?P<level>\w+), torch (?P<torch>\S+), commit (?P<commit>\S+), medians",
        FIRST_SCREEN.replace("\n", " "),
    )
    assert found
    with (ROOT / "benchmarks" / "results" / "cpu.csv").open() as file:
        shape = (found["N"], found["K"], found["D"], "training")
        rows = [x for x in csv.DictReader(file) if (x["rows"], x["codebook_size"], x["dim"], x["kind"]) == shape]
    for row in rows:
        machine = (row["processor"], row["threads"], row["SIMD level"], row["torch"], row["commit"])
        assert machine == (found["processor"], found["threads"], found["level"], found["torch"], found["commit"])
    ours = next(float(row["median_ms"]) for row in rows if row["contender"] == "vqkernels EMA")
    peer = min(float(row["median_ms"]) for row in rows if row["ours"] == "0")
    assert (f"{ours:.1f}", f"{peer:.1f}", f"{peer / ours:.2f}") == (found["ours"], found["peer"], found["ratio"])


def test_it_is_short_and_says_once_that_no_gpu_has_run_the_kernels():
    assert len(README.split()) <= 900
    assert len(re.findall(r"no gpu has run", README, flags=re.I)) == 1
    for section in README.split("\n## ")[1:]:
        text = re.sub(r"```.*?```|^\|.*?$|!?\[[^]]*\]\([^)]*\)", " ", section, flags=re.S | re.M)
        assert len(text.split()) <= 80, section.splitlines()[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}: there is no such heading"
