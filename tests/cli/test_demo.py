"""`vqkernels demo`: the figures it prints, in full, and its report."""

import html
import re

import pytest
import torch
from training.report.test_report import check_self_contained

from vqkernels.cli.demo import chosen_precision
from vqkernels.cli.main import main


@pytest.mark.slow
def test_the_demo_meets_its_figures(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    output = capsys.readouterr().out
    assert re.findall(r"PASS|—", output) == ["PASS", "PASS", "PASS"], output
    pictures = re.findall(r"^  (.*\.png)$", output, re.MULTILINE)
    assert {"reconstructions", "samples"} == {re.sub(r".*/(\w+)_\d+\.png", r"\1", picture) for picture in pictures}
    page = (tmp_path / "demo" / "report.html").read_text()
    text = html.unescape(page)
    check_self_contained(page)
    printed = re.findall(r"^(.*\S) +([\d.]+)%? +(?:PASS|—)", output, re.MULTILINE)
    assert len(printed) == 3 and all(f"<td>{name}</td><td>{value}" in text for name, value in printed)
    # what is finished is measured again, not trained again
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    figures = re.compile(r"^.*PASS.*$", re.MULTILINE)
    assert figures.findall(capsys.readouterr().out) == figures.findall(output)


@pytest.mark.parametrize(("asked", "amx", "chosen"), [
    ("auto", True, "bfloat16"), ("auto", False, "off"), ("off", True, "off"), ("bfloat16", False, "bfloat16"),
])  # fmt: skip
def test_the_precision_suits_the_cpu(monkeypatch, asked, amx, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    assert chosen_precision(asked) == chosen
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert chosen_precision("auto") == "off"
