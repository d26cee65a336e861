"""`vqkernels demo`: the figures it prints, in full."""

import re

import pytest

from vqkernels.cli.main import main


@pytest.mark.slow
def test_the_demo_meets_its_figures(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    output = capsys.readouterr().out
    assert re.findall(r"PASS|—", output) == ["PASS", "PASS", "PASS"], output
    pictures = re.findall(r"^  (.*\.png)$", output, re.MULTILINE)
    assert {"reconstructions", "samples"} == {re.sub(r".*/(\w+)_\d+\.png", r"\1", picture) for picture in pictures}
    # what is finished is measured again, not trained again
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    figures = re.compile(r"^.*PASS.*$", re.MULTILINE)
    assert figures.findall(capsys.readouterr().out) == figures.findall(output)
