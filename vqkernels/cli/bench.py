"""`vqkernels bench`: speed, memory and errors beside every installed peer, or of a user's model. Needs torch alone."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vqkernels.bench import cases, machine, plot, report
from vqkernels.bench.prediction import Comparison
from vqkernels.bench.run import Effort, WrongIndex
from vqkernels.bench.run import run as run_cases
from vqkernels.bench.user_model import FACTORY_HELP, ModelError, load

_DESCRIPTION = """
Measure the kernels beside other libraries on this machine's CPU. A library that is not installed is named and left
out; pip install 'vqkernels[bench]' installs all. With --model, predict and measure the gain for your model instead.
"""
_EPILOG = f"""{FACTORY_HELP.rstrip()}
The model must hold a quantizer: vqkernels.nn.VectorQuantizer, one that `vqkernels swap` knows, or a module with a
tensor `codebook` (K, D), an int `channel_dim`, and forward(z) -> (quantized, indices, loss). A peer's is replaced by
vqkernels; our own is compared with the usual one-hot layer in its place.
"""
_MARKS = ("<!-- vqkernels bench -->", "<!-- end of vqkernels bench -->")
_CPU = "cpu"  # the kind of machine that the cases run on; names the files


def run(arguments: Sequence[str]) -> int:
    """Measure and report; returns 1 if an index of ours was wrong, which ends the run, and 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="vqkernels bench",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="PACKAGE.MODULE:FACTORY", help="measure this model instead; see below")
    parser.add_argument("--out", type=Path, help=f"write {_CPU}.md, {_CPU}.csv and {_CPU}.png here")
    marks = f"put the table of this run between the lines {_MARKS[0]} and {_MARKS[1]} of this file"
    parser.add_argument("--readme", type=Path, help=marks)
    parser.add_argument("--quick", action="store_true", help="small cases, two rounds: shows only that it runs")
    parser.add_argument("--only", choices=list(report.TITLES), help="measure one kind of case")
    parser.add_argument("--minutes", type=float, default=9.0, help="goal; large cases keep five rounds (default: 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each contender")
    options = parser.parse_args(arguments)
    if options.threads < 1 or options.minutes <= 0:
        parser.error("--threads and --minutes must be positive")
    if options.readme is not None:
        try:
            report.put(options.readme, _MARKS)
        except ValueError as error:
            parser.error(f"--readme: {error}")
    _limit_threads(options.threads)
    if options.model is not None:
        return _measure_model(options.model, options.threads, min(60 * options.minutes, 60.0), options.quick)
    effort = Effort(options.threads, options.minutes)
    chosen = cases.default_cases()
    if options.quick:
        effort, chosen = Effort(options.threads, 0.1, least=2, most=2, quick=True), cases.quick_cases()
    chosen = [case for case in chosen if options.only in (None, case.kind)]
    facts = machine.facts(options.threads)
    results: list[report.Result] = []
    try:
        for number, results in enumerate(run_cases(chosen, effort, _model), 1):
            if number <= len(chosen):
                mine, peer = report.ours(results), report.best_peer(results)
                quotient = report.ratio(peer, mine)
                text = f"{quotient:.2f}x the speed of {peer.contender}" if peer and quotient else "no peer to compare"
                print(f"[{number}/{len(chosen)}] {results[0].case.kind} {results[0].case.label}: {text}", flush=True)
    except WrongIndex as error:
        print(f"vqkernels bench: {error}", file=sys.stderr)
        return 1
    text = report.text(results, facts)
    print(f"\n{text}")
    if options.out is not None:
        _write(options.out, text, results, facts)
    if options.readme is not None:
        report.put(options.readme, _MARKS, report.short(results, facts))
    return 0


def _measure_model(spec: str, threads: int, seconds: float, quick: bool) -> int:
    """Predict, then measure; returns 2 after a message if the model cannot be measured."""
    least, most = (2, 2) if quick else (5, 25)
    try:
        comparison = Comparison(load(spec), lambda: load(spec))
        print("\n".join(comparison.quantizers()), flush=True)
        prediction = comparison.predict(threads, 0.4 * seconds, least, most)
        measurement = comparison.measure(threads, 0.6 * seconds, least, most)
    except ModelError as error:
        print(f"vqkernels bench: {error}", file=sys.stderr)
        return 2
    print(f"step = forward, loss, backward, Adam; {threads} threads; milliseconds are medians [quartiles]")
    print(comparison.report(prediction, measurement))
    return 0


def _limit_threads(threads: int) -> None:
    """Equal threads for all: those of torch, and the OpenMP and BLAS pools of the others where these can be set."""
    torch.set_num_threads(threads)
    try:
        import sklearn.metrics  # noqa: F401  loads the pools that are limited below
        from threadpoolctl import threadpool_limits
    except ImportError:
        return
    threadpool_limits(threads)


def _model(codebook_size: int) -> torch.nn.Module:
    from vqkernels.models import VQVAE

    torch.manual_seed(0)
    return VQVAE(3, hidden_channels=cases.HIDDEN, code_dim=cases.CODE_DIM, codebook_size=codebook_size)


def _write(folder: Path, text: str, results: list[report.Result], facts: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{_CPU}.md").write_text(text)
    report.write_csv(folder / f"{_CPU}.csv", results, facts)
    written = ["md", "csv"]
    try:
        plot.draw(folder / f"{_CPU}.png", results, facts)
        written.append("png")
    except ModuleNotFoundError as error:
        print(f"vqkernels bench: no plot without {error.name}: pip install 'vqkernels[bench]'", file=sys.stderr)
    print(f"wrote {', '.join(str(folder / f'{_CPU}.{kind}') for kind in written)}")
