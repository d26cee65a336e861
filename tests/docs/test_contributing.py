"""CONTRIBUTING.md and docs/architecture.md name files that exist, and their lists of files are complete."""

import re
from pathlib import Path

import pytest

import vqkernels
from vqkernels.backends.table import BACKENDS, OPERATORS

ROOT = Path(vqkernels.__file__).parents[1]
PAGES = ["CONTRIBUTING.md", "docs/architecture.md"]
SUFFIXES = r"py|md|cpp|h|inl|cu|cuh|toml|txt|yaml|yml|png|json"
# In back-ticks: a path with a slash, or a file of the root.
PATH = re.compile(rf"`((?:[\w.<>-]+/)+[\w.<>-]*|[\w.-]+\.(?:{SUFFIXES}))`")
ROOMS = ("csrc/cpu", "csrc/bindings", "vqkernels/ops", "vqkernels/nn", "vqkernels/dropin")
TESTS = ("tests/ops", "tests/nn", "tests/dropin")


def named(text: str) -> list[str]:
    """The paths that a text names; a link names its file in the link's own way, which test_readme.py follows."""
    return PATH.findall(re.sub(r"```.*?```|\[[^]]*\]\([^)]*\)", "", text, flags=re.S))


def recipes() -> dict[str, tuple[str, list[str]]]:
    """The sections "Add ...": the example's name, and the files for it."""
    found = {}
    for section in re.split(r"^## ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M):
        if section.startswith("Add "):
            example = re.search(r"Example: `(<\w+>)` is `(\w+)`", section)
            assert example, section.splitlines()[0]
            files = [path.replace(example[1], example[2]) for path in named(section)]
            found[section.splitlines()[0]] = (example[2], files)
    return found


def missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not (ROOT / path).exists()]


def test_every_named_file_exists():
    for page in PAGES:
        outside = [path for path in named((ROOT / page).read_text()) if "<" not in path]
        assert len(outside) >= 20 and missing(outside) == [], page


@pytest.mark.parametrize("recipe", recipes())
def test_the_files_of_the_example_exist(recipe):
    _, files = recipes()[recipe]
    assert len(files) >= 5 and missing(files) == []


@pytest.mark.parametrize("recipe", recipes())
def test_no_file_of_the_example_is_left_out(recipe):
    """Every file whose name is that of the example, or ends in it, or begins with it."""
    example, files = recipes()[recipe]
    there = [path for room in (*ROOMS, *TESTS) for path in (ROOT / room).glob("*") if path.is_file()]
    its = [path.relative_to(ROOT) for path in there if re.fullmatch(rf"(.*_)?{example}(_\w+)?", path.stem)]
    assert [str(path) for path in its if str(path) not in files] == []


def test_a_file_that_is_gone_is_noticed():
    assert named("`csrc/cpu/gone.h`, `setup.py`, `ninja`, `vqkernels info`, `.[dev]`, [`a.md`](docs/a.md)") == [
        "csrc/cpu/gone.h",
        "setup.py",
    ]
    assert missing(["csrc/cpu/gone.h", "setup.py"]) == ["csrc/cpu/gone.h"]


def test_the_workflow_calls_what_ci_calls():
    steps = re.findall(r"- (?:uses|run): (\S+)", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert [step.partition("@")[0] for step in steps] == ["actions/checkout", "actions/setup-python", ".ci/run"]
    assert (ROOT / ".ci" / "run").exists()


def test_a_bug_report_asks_for_the_output_of_info():
    forms = {path.stem: path.read_text() for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")}
    assert set(forms) == {"bug", "feature"} and "`vqkernels info`" in forms["bug"]


def test_the_hooks_run_what_lint_runs():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.M)
    assert lint
    for tool in re.findall(r"\$\(BIN\)/(ruff check|ruff format|mypy)", lint[1]):
        assert f"entry: {tool}" in hooks


def backend_table() -> str:
    """The operators by backend, from the table that the library reads, without the passes of the PixelCNN."""
    lines = [f"| operator | {' | '.join(f'`{name}`' for name in BACKENDS)} |", "|---|" + "---|" * len(BACKENDS)]
    shown = {x: row for x, row in OPERATORS.items() if "triton" in row}
    for operator, row in shown.items():
        cells = ["–" if name not in row else "plain" if row[name] in BACKENDS else "yes" for name in BACKENDS]
        lines.append(f"| `{operator}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_page_shows_the_table_of_backends():
    assert backend_table() in (ROOT / "docs" / "architecture.md").read_text()
