"""Every command and every Python block of README.md, CONTRIBUTING.md and docs/*.md runs, on synthetic data, shortened.

Words in capitals are placeholders for paths, which `paths` makes. `SHORT` shortens a training. A command that cannot
run here is in `NOT_RUN` with the reason, and its options must exist. A new command must be run or be listed: a test
checks it.
"""

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import vqkernels
from vqkernels.cli.main import COMMANDS, main

ROOT = Path(vqkernels.__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# The beginnings of commands that are not run, and why.
NOT_RUN = {
    "make demo": "takes a minute; tests/cli/test_demo.py holds what it runs",
    "make test": "these are the tests",
    "make quick": "these are some of the tests",
    "pip install": "it would change the environment",
    "python3 -m venv": "it would make an environment",
    ".venv/bin/pip install": "it would change the environment",
    ". .venv/bin/activate": "it changes a shell",
    "pre-commit": "it would change the repository",
    "pytest tests": "these are the tests",
    "vqkernels demo": "takes a minute",
    "vqkernels bench": "takes nine minutes; tests/bench runs it with --quick",
    "vqkernels verify": "needs a GPU",
    "vqkernels attack": "takes as long as its --minutes",
    "vqkernels swap": "needs a model of the reader's; tests/cli/test_swap.py has some",
    "vqkernels compare": "takes minutes; tests/cli/test_compare.py runs a short one",
    "python -m benchmarks": "takes minutes to hours; tests/benchmarks runs them on less",
    "python -m studies": "takes minutes to hours; tests/studies runs them on less",
    "pytest benchmarks": "takes a minute",
}
# Every training of a page is shortened to this length and size.
SHORT = {
    "--vqvae.steps": 2,
    "--vqvae.batch-size": 8,
    "--vqvae.hidden-channels": 8,
    "--vqvae.code-dim": 4,
    "--vqvae.codebook-size": 16,
    "--vqvae.downsamplings": 1,
    "--vqvae.residual-blocks": 1,
    "--prior.steps": 2,
    "--prior.batch-size": 8,
    "--prior.hidden-channels": 8,
    "--prior.num-layers": 2,
    "--prior.head-channels": 8,
}


class Piece(NamedTuple):
    """A command or a block of Python, and its place."""

    page: str
    line: int
    text: str


def fenced(page: Path, languages: set[str]) -> list[Piece]:
    """The fenced blocks of a page in one of these languages."""
    found, begin, language = [], 0, ""
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("```") and begin:
            if language in languages:
                found.append(Piece(page.name, begin + 1, "\n".join(lines[begin : number - 1])))
            begin = 0
        elif line.startswith("```"):
            begin, language = number, line.removeprefix("```").strip()
    assert not begin, f"{page.name} ends in a fenced block"
    return found


def commands() -> list[Piece]:
    """The commands of all shell blocks, one by one, without comments; `\\` continues a line."""
    found = []
    for page in PAGES:
        for block in fenced(page, {"", "sh", "shell", "bash", "console"}):
            for number, line in enumerate(re.sub(r"\\\n\s*", " ", block.text).splitlines()):
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words:
                    found.append(Piece(block.page, block.line + number, shlex.join(words)))
    return found


def spoken() -> list[Piece]:
    """The commands in the prose of all pages."""
    found = []
    for page in PAGES:
        text = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), page.read_text(), flags=re.S)
        for match in re.finditer(r"`((?:[A-Z_]+=\S+ )?(?:vqkernels|python -m|make) [^`]*)`", text):
            line = text[: match.start()].count("\n") + 1
            found.append(Piece(page.name, line, " ".join(match[1].split())))
    return found


def reason(command: str) -> str | None:
    """Why it is not run; variables that it sets do not matter."""
    words = itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(command))
    bare = shlex.join(words)
    return next((why for beginning, why in NOT_RUN.items() if bare.startswith(beginning)), None)


def once(pieces: list[Piece]) -> list:
    """Parameters: every text once, named by its first place. Starting several processes is slow."""
    first = {piece.text: piece for piece in reversed(pieces)}
    return [
        pytest.param(
            piece,
            id=f"{piece.page}:{piece.line}",
            marks=[pytest.mark.slow] if piece.text.startswith("torchrun") else [],
        )
        for piece in reversed(first.values())
    ]


def fewer_steps(words: list[str]) -> list[str]:
    """A training command, cut down; a resumed run, or one with a configuration, is small already."""
    whole = "--resume" not in words and "--config" not in words
    words = [str(SHORT.get(before, word)) for before, word in zip([""] + words, words, strict=False)]
    added = [part for name, value in SHORT.items() if whole and name not in words for part in (name, str(value))]
    return words + added


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Images, a run of both stages, its codes: for commands that read them."""
    root = tmp_path_factory.mktemp("pages")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = root / "images" / ("cat", "dog", "owl")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    run, codes = root / "run", root / "codes"
    assert main(["train", *fewer_steps(["--data", str(root / "images"), "--out", str(run)])]) == 0
    assert main(["encode", "--run", str(run), "--data", str(root / "images"), "--out", str(codes)]) == 0
    return {"images": root / "images", "run": run, "codes": codes}


def paths(words: list[str], trained: dict[str, Path], folder: Path) -> list[str]:
    """A command with paths in place of its capitals; it writes into `folder`."""
    known = {
        "FOLDER": trained["images"],
        "IMAGE": trained["images"] / "cat" / "0.png",
        "LABEL": "cat",
        "CONFIG": trained["run"] / "config.toml",
        "RUN": trained["run"],
        "CODES": trained["codes"],
    }
    written = words[words.index("--out") + 1] if "--out" in words else None
    if written in known or (written or "").isupper():
        known[written] = folder / written.lower()
    if "--resume" in words:
        shutil.copytree(trained["run"], known["RUN"])
    unknown = [word for word in words if re.fullmatch(r"[A-Z]{2,}", word) and word not in known]
    assert not unknown, f"{unknown[0]} is an unknown placeholder: add its path to tests/docs/test_pages.py"
    return [str(known.get(word, word)) for word in words]


@pytest.mark.parametrize("piece", once([piece for piece in commands() if reason(piece.text) is None]))
def test_commands_run(piece, trained, tmp_path, monkeypatch, request):
    words = shlex.split(piece.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if words[0] == "torchrun":
        place = next(number for number, word in enumerate(words) if word in COMMANDS)
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        program, given = [*program, *words[1:place]], words[place:]
    elif words[0] == "vqkernels" and words[1] in COMMANDS:
        program, given = [], words[1:]
    else:
        pytest.fail(
            f"no test runs this: add a way to run it to tests/docs/test_pages.py, or a reason to NOT_RUN: {piece}"
        )
    given = paths(given, trained, tmp_path)
    if given[0] == "train":
        given = fewer_steps(given)
    if not program:
        assert main(given) == 0, piece
        return
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run([*program, *given], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{piece}\n{done.stderr}"


@contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    """What torchrun gives to each of its processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("piece", once([piece for page in PAGES for piece in fenced(page, {"python"})]))
def test_python_blocks_run(piece, trained, tmp_path, monkeypatch):
    """With the names that a page takes for granted."""
    monkeypatch.chdir(tmp_path)
    names = {
        "z": torch.randn(2, 64, 8, 8),
        "images": torch.rand(2, 3, 32, 32),
        "labels": torch.zeros(16, dtype=torch.int64),
        "run": trained["run"],
        "codes_directory": trained["codes"],
        "vqkernels": vqkernels,
    }
    if piece.page == "wrappers.md":  # its first block is the model of all others
        exec(fenced(ROOT / "docs" / piece.page, {"python"})[0].text, names)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "swap_quantizers(model)" in piece.text:
        layers = pytest.importorskip("vector_quantize_pytorch")
        names["model"] = torch.nn.ModuleDict({"quantizer": layers.VectorQuantize(dim=8, codebook_size=16)})
    with group_of_one(tmp_path) if re.search("DistributedData|fully_shard|new_group", piece.text) else nullcontext():
        exec(compile(piece.text, f"{piece.page}, line {piece.line}", "exec"), names)


@pytest.mark.parametrize("piece", once([*spoken(), *(piece for piece in commands() if reason(piece.text) is not None)]))
def test_what_is_not_run_exists(piece, capsys):
    """The command, and every option that the page gives it."""
    words = [word for word in shlex.split(piece.text) if "=" not in word or word.startswith("-")]
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    if words[0] == "vqkernels":
        if words[1] not in COMMANDS:
            assert words[1] in ("COMMAND", "--version"), f"there is no such command: {piece}"
            return
        with pytest.raises(SystemExit):
            main([words[1], "--help"])
        known = capsys.readouterr().out
    elif words[0] == "python":
        module = ROOT / (words[2].replace(".", "/") + ".py")
        known = (module if module.exists() else module.with_suffix("") / "__main__.py").read_text()
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M), piece
        return
    else:
        return
    missing = [option for option in options if option not in known]
    assert not missing, f"{missing[0]} is no option: {piece}"


def test_a_new_command_is_noticed(tmp_path, monkeypatch):
    """The pages' own reader: what it finds in a page, and that nothing else counts as known."""
    page = tmp_path / "new.md"
    page.write_text(
        "```\nvqkernels fly \\\n   --high  # now\n\n$ other tool\n```\n```python\nx = 1\n```\n`make believe`\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PAGES", [page])
    found = commands()
    assert [piece.text for piece in found] == ["vqkernels fly --high", "other tool"]
    assert all(reason(piece.text) is None for piece in found)
    assert [piece.text for piece in fenced(page, {"python"})] == ["x = 1"]
    assert [piece.text for piece in spoken()] == ["make believe"]
