"""The dispatcher: help, unknown commands, missing extras, `info` on the core alone."""

import importlib
import subprocess
import sys

import pytest

from vqkernels.cli.main import COMMANDS, main

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"sklearn", "PIL", "tqdm", "tyro", "tomli_w", "tensorboard", "safetensors"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
from vqkernels.cli.main import main
"""


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments,sentence", [([], "a command is needed"), (["trian"], "there is no command 'trian'")]
)
def test_an_unknown_command_shows_the_usage(capsys, arguments, sentence):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vqkernels: {sentence}\n") and "usage: vqkernels COMMAND" in error


def test_version(capsys):
    from vqkernels import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("command", ["encode", "decode", "info"])
def test_an_interrupted_command_is_one_sentence(capsys, monkeypatch, command):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"vqkernels.cli.{command}"), "run", interrupted)
    assert main([command]) == 1
    assert capsys.readouterr().err == f"vqkernels {command}: interrupted\n"


@pytest.mark.parametrize("command", ["train", "sample", "demo", "compare"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"usage: vqkernels {command}" in capsys.readouterr().out


def test_without_the_extra_info_works_and_train_names_the_pip_command():
    code = HIDE + "print(main(['info']), main(['train', '--data', 'digits', '--out', 'x']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1] == "0 2", done.stderr
    assert done.stdout.startswith("vqkernels")
    assert "pip install 'vqkernels[train]'" in done.stderr and len(done.stderr.strip().splitlines()) == 1
