"""The kernels of one SIMD level stay in it: the linker may take nothing of theirs for another level."""

import shutil
import subprocess

import pytest
from native.build import ROOT, compiler, flags

LEVELS = sorted((ROOT / "csrc" / "cpu").glob("level_*.cpp"))


@pytest.mark.slow
@pytest.mark.parametrize("source", LEVELS, ids=lambda path: path.stem)
def test_a_level_shows_nothing_but_its_table(source, tmp_path):
    """A weak symbol, such as an inline function of the standard library, would be shared with slower CPUs."""
    if compiler() is None or shutil.which("nm") is None:
        pytest.skip("a C++ compiler and nm are needed")
    common, levels = flags()
    command = [
        compiler() or "c++",
        *common,
        *levels.get(source.name, []),
        "-c",
        str(source),
        "-o",
        str(tmp_path / "x.o"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    listed = subprocess.run(["nm", "-C", str(tmp_path / "x.o")], check=True, capture_output=True, text=True).stdout
    symbols = [line.split(maxsplit=1) for line in (line[17:] for line in listed.splitlines())]
    shown = {name for kind, name in symbols if kind in "TBDRWVui"}
    table = source.stem.removeprefix("level_") + "_kernels()"
    assert shown - {"DW.ref.__gxx_personality_v0"} <= {f"vqkernels::{table}"}
