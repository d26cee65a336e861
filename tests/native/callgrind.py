"""Instruction counts of the raw kernels under valgrind: the same on every machine, whatever else it does.

`make instructions` records them in benchmarks/results/instructions.json; test_instructions.py compares.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from native.build import ROOT, build, compiler, compiler_version

TABLE = ROOT / "benchmarks" / "results" / "instructions.json"


def missing() -> str | None:
    """Why nothing can be counted here, or None."""
    if shutil.which("valgrind") is None:
        return "instruction counts need valgrind: apt-get install valgrind"
    return None if compiler() else "instruction counts need a C++ compiler"


def counts(program: Path, what: str) -> dict[str, float]:
    """Instructions per unit of work of everything that `instructions what` runs, by name."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", "--collect-atstart=no"]
        command += ["--toggle-collect=measured", "--dump-after=measured", str(program), what]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        lines = [line.split("\t") for line in done.stdout.splitlines()]
        found = {}
        for number, (name, work) in enumerate(lines, 1):
            told = (Path(folder) / f"out.{number}").read_text()
            total = re.search(r"^(?:summary|totals): (\d+)", told, re.MULTILINE)
            assert total, f"callgrind wrote no total for {name}"
            found[name] = int(total[1]) / float(work)
    return found


def record() -> None:
    """Writes the table."""
    with tempfile.TemporaryDirectory() as folder:
        found = counts(build("instructions", Path(folder)), "kernels")
    table = {
        "unit": "instructions per row x code x channel (sweep, sift, search, entropy), row (group), element (others)",
        "compiler": compiler_version(),
        "counts": {name: float(f"{value:.4g}") for name, value in found.items()},
    }
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    problem = missing()
    if problem:
        sys.exit(problem)
    record()
