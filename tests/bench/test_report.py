"""The report: ratios, the column of losses, and the whole command on a machine with none of the peers."""

import csv
import os
import subprocess
import sys
import time

import pytest
import torch
from pages import ROOT, shown

from vqkernels.bench import entropy_peers, report, run
from vqkernels.bench.cases import Case
from vqkernels.bench.run import Effort, Result, WrongIndex
from vqkernels.bench.timing import Timing
from vqkernels.cli.bench import _MARKS
from vqkernels.cli.bench import run as command

CASE = Case("search", 100, 10, 4)
FACTS = {"processor": "P", "threads": "1", "SIMD level": "avx2", "torch": "T", "vqkernels": "V", "commit": "C"}


def result(name, seconds, ours=False, competes=True, **more):
    timing = None if seconds is None else Timing(seconds, seconds * 0.9, seconds * 1.1, 7)
    return Result(CASE, name, "index", ours, competes and not ours, timing, 1e9, **more)


def test_the_best_peer_and_where_we_lose():
    group = [
        result("vqkernels", 0.2, ours=True, megabytes=9.0, wrong=0, checked=100, decided=0.99),
        result("fast", 0.1, megabytes=1.0, wrong=2, checked=100),
        result("slow", 0.6, megabytes=20.0, wrong=0, checked=100),
        result("torch.mm alone", 0.05, competes=False),
        result("absent", None, problem="no; pip install absent"),
    ]
    assert report.best_peer(group).contender == "fast"
    assert report.ratio(group[2], report.ours(group)) == pytest.approx(3.0)
    lost = report.losses(group)
    assert lost == ["fast is 2.00x faster", "fast needs 8 MB less", "torch.mm alone is 4.00x faster"]
    told = report.text(group, FACTS)
    assert "P, 1 threads, avx2, torch T, commit C; medians." in told
    assert all(x in told for x in lost) and "unavailable: no; pip install absent" in told and "99.00%" in told


def test_the_csv_says_where_it_comes_from(tmp_path):
    report.write_csv(tmp_path / "x.csv", [result("vqkernels", 0.2, ours=True), result("absent", None)], FACTS)
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [x["median_ms"] for x in rows] == ["200", ""] and rows[0]["commit"] == "C" and rows[0]["gflops"] != ""


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from vqkernels.bench.plot import draw

    draw(tmp_path / "x.png", [result("vqkernels", 0.2, ours=True), result("fast", 0.1)], FACTS)
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_wrong_index_of_ours_ends_the_run(monkeypatch):
    broken = run.Peer("broken", "", lambda z, e: lambda: torch.full((len(z),), -1), "vqkernels", ours=True)
    monkeypatch.setitem(run.CONTENDERS, "search", (broken,))
    with pytest.raises(WrongIndex, match="broken gave .* wrong indices at N=100 K=10 D=4"):
        next(run.run([CASE], Effort(1, least=1, most=1), lambda size: None))


def test_a_wrong_entropy_of_ours_ends_the_run(monkeypatch):
    right = entropy_peers._entropy_loss
    monkeypatch.setattr(entropy_peers, "_entropy_loss", lambda z, e: (1.001 * right(z, e)[0], right(z, e)[1]))
    with pytest.raises(WrongIndex, match="N=100 K=10 D=4: the sample entropy is off by 1.0e-03 of its largest element"):
        next(run.run([Case("entropy", 100, 10, 4)], Effort(1, least=1, most=1, quick=True), lambda size: None))


def test_a_peer_that_fails_is_reported_and_the_others_go_on(monkeypatch):
    def fail(z, e):
        raise OSError("no licence")

    monkeypatch.setitem(run.CONTENDERS, "search", (*run.CONTENDERS["search"][:1], run.Peer("failing", "", fail)))
    mine, failing = next(run.run([CASE], Effort(1, least=1, most=1), lambda size: None))
    assert mine.timing and mine.wrong == 0 and failing.problem == "OSError: no licence"


HIDE = """
import sys

for name in ("sklearn", "faiss", "vector_quantize_pytorch", "diffusers", "matplotlib"):
    sys.modules[name] = None  # an import of it now raises ModuleNotFoundError
from vqkernels.cli.main import main
sys.exit(main(["bench", "--quick", "--threads", "1", "--out", sys.argv[1]]))
"""


def test_the_command_runs_without_any_peer(tmp_path):
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HIDE, str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 180  # half a minute on a quiet machine; other tests run beside it
    assert "pip install faiss-cpu" in done.stdout and "no plot without matplotlib" in done.stderr
    assert {x.name for x in tmp_path.iterdir()} == {"cpu.md", "cpu.csv"}
    rows = list(csv.DictReader((tmp_path / "cpu.csv").open()))
    assert {x["kind"] for x in rows} == {
        "search",
        "training",
        "residual",
        "residual training",
        "entropy",
        "vqvae",
    }
    assert all(x["wrong"] in ("", "0") for x in rows if x["ours"] == "1")


def test_the_table_goes_between_the_marks(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{_MARKS[0]}\nold\n{_MARKS[1]}\nafter\n")
    assert command(["--quick", "--only", "vqvae", "--threads", "1", "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{_MARKS[0]}\n") and text.endswith(f"|\n{_MARKS[1]}\nafter\n")
    assert "old" not in text and "one-hot layer" in text
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        command(["--quick", "--readme", str(page)])
    assert "has no line '<!-- vqkernels bench -->'" in capsys.readouterr().err


def test_the_page_shows_a_committed_run():
    """What stands between a page's marks is copied from the committed report, by `--readme`."""
    assert shown(_MARKS) in (ROOT / "benchmarks" / "results" / "cpu.md").read_text()
