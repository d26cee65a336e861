"""docs/compare.md: its commands are commands, and its figures are those of the committed results."""

import json
import re
import shlex
from pathlib import Path

import pytest
import tyro
from training.report.test_report import check_self_contained

import vqkernels
from vqkernels.cli.compare import CompareArguments

DOCS = Path(vqkernels.__file__).parents[1] / "docs"
RESULTS = sorted(DOCS.glob("compare/*/results.json"))


def likelihood_row(folder: Path) -> str:
    """A row of the first table of the page."""
    table = json.loads((folder / "results.json").read_text())
    gradient, ema, vae = (x["likelihoods"] for x in table["figures"])
    best = min(gradient["best_bound"], ema["best_bound"])
    cells = [
        f"[{folder.name}](compare/{folder.name}/report.md)",
        *(f"{x['bound']:.2f} → {x['best_bound']:.2f}" for x in (gradient, ema)),
        f"{vae['bound']:.2f} ({vae['best_bound']:.2f})",
        f"{best - vae['bound']:+.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def collapse_row(folder: Path) -> str:
    """A row of the second table."""
    table = json.loads((folder / "results.json").read_text())
    found = table["collapse"]
    cells = [
        folder.name,
        f"{found['vae_kl']:.2f}",
        f"{found['active_units']} of {found['units']}",
        f"{found['vae_shuffled'] - found['vae_given_latents']:.2f}",
        f"{found['perplexity']:.0f} of {found['codebook_size']}",
        f"{found['vqvae_shuffled'] - found['vqvae_given_codes']:.1f}",
        f"{found['alone'] - found['vqvae_given_codes']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def probe_row(folder: Path) -> str:
    """A row of the third table."""
    table = json.loads((folder / "results.json").read_text())
    probes = [x["probe"] for x in table["figures"]] + [table["pixels_probe"], table["chance"]]
    return "| " + " | ".join([folder.name, *(f"{x:.1f} %" for x in probes)]) + " |"


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.parent.name)
def test_the_figures_are_those_of_the_committed_results(file):
    lines = (DOCS / "compare.md").read_text().splitlines()
    missing = [row for row in (f(file.parent) for f in (likelihood_row, collapse_row, probe_row)) if row not in lines]
    assert missing == []


def test_every_committed_result_is_known():
    assert {file.parent.name for file in RESULTS} >= {"digits"}


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.parent.name)
def test_the_committed_reports_are_small_whole_and_those_of_the_results(file):
    page = (file.parent / "report.html").read_text()
    check_self_contained(page)
    assert len(page) < 1_000_000
    table, markdown = json.loads(file.read_text()), (file.parent / "report.md").read_text()
    for figures in table["figures"]:
        shown = f"{figures['likelihoods']['bound']:.3f}"
        assert f"<td>{shown}</td>" in page and f"| {shown} |" in markdown
    assert all((file.parent / name).exists() for name in re.findall(r"\]\((\w+\.png)\)", markdown))


def test_every_command_of_the_page_is_one():
    blocks = re.findall(r"```\n(.*?)```", (DOCS / "compare.md").read_text(), re.DOTALL)
    commands = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    parsed = [shlex.split(line) for line in commands if line]
    assert len(parsed) >= 3 and all(words[:2] == ["vqkernels", "compare"] for words in parsed)
    for words in parsed:
        assert tyro.cli(CompareArguments, args=words[2:]).data
