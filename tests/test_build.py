"""What setup.py decides about the CUDA kernels: nothing is compiled here."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parents[1]
VARIABLES = ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH")


@pytest.fixture
def build(monkeypatch):
    """The names of setup.py, run in an environment of its own."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)

    def run(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return SimpleNamespace(**runpy.run_path("setup.py"))

    return run


def included(path: Path, seen: set[Path]) -> set[Path]:
    """`path` and every file of csrc that it includes, directly or not."""
    if path not in seen:
        seen.add(path)
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            places = (path.parent / name, ROOT / "csrc" / name)
            included(next(place.resolve() for place in places if place.exists()), seen)
    return seen


def test_a_verification_vouches_for_every_file_that_the_kernels_include(build):
    sources = {*(ROOT / "csrc" / "cuda").glob("*.cu"), *(ROOT / "csrc" / "bindings").glob("cuda_*.cpp")}
    seen: set[Path] = set()
    for source in sources:
        included(source, seen)
    hashed = {path.resolve() for pattern in build(FORCE_CUDA="0").CUDA_SOURCES for path in ROOT.glob(pattern)}
    assert ROOT / "csrc" / "margin.h" in seen, "the certificate"
    assert not seen - hashed


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ("8.0;9.0a", [("80", False), ("90a", False)]),
        ("7.5 8.6+PTX, 10.0;", [("86", True), ("100", False)]),
        ("Turing;Hopper+PTX", [("90a", True)]),
    ],
)
def test_architectures_are_those_of_the_list(listed, found, build):
    assert build(FORCE_CUDA="0", TORCH_CUDA_ARCH_LIST=listed).CUDA.architectures == found


def test_a_list_that_is_not_understood_stops_only_who_insists(build, monkeypatch):
    nvcc = SimpleNamespace(exists=True)
    assert "FORCE_CUDA=0" in build(FORCE_CUDA="0", TORCH_CUDA_ARCH_LIST="native").CUDA.absent
    monkeypatch.setattr(Path, "exists", lambda self: nvcc.exists if self.name == "nvcc" else False)
    sentence = "TORCH_CUDA_ARCH_LIST must hold entries like 8.0, 9.0a or 10.0\\+PTX, got 'native'"
    assert re.match(sentence, build(TORCH_CUDA_ARCH_LIST="native").CUDA.absent)
    with pytest.raises(SystemExit, match=f"^FORCE_CUDA is set, but {sentence}$"):
        build(FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="native")
    nvcc.exists = False
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "nvcc is not found" in build(TORCH_CUDA_ARCH_LIST="native").CUDA.absent
    with pytest.raises(SystemExit, match="^FORCE_CUDA is set, but nvcc is not found: set CUDA_HOME"):
        build(FORCE_CUDA="1")


@pytest.mark.parametrize("insisted", [False, True])
def test_a_toolkit_that_does_not_link_costs_the_cuda_kernels_alone(insisted, build, monkeypatch):
    """nvcc without the headers or the static runtime, as some package managers split it."""
    module = build(FORCE_CUDA="0")
    module.CUDA.insisted = insisted
    command = module.BuildKernels(setuptools.Distribution())
    command.failures, command.cuda = {}, {"nvcc": "13.0"}
    library = module.operators()
    library.extra_objects, library.libraries = ["nearest.cuda.o"], [*library.libraries, "cudart_static"]
    tried = []

    def compile_all(self, ext):
        tried.append(list(ext.libraries))
        if "cudart_static" in ext.libraries:
            raise RuntimeError("cannot find -lcudart_static")

    monkeypatch.setattr(build_ext, "build_extension", compile_all)
    if insisted:
        with pytest.raises(SystemExit, match="FORCE_CUDA is set, but .* cannot find -lcudart_static"):
            command.build_extension(library)
        return
    command.build_extension(library)
    assert "cudart_static" in tried[0] and "cudart_static" not in tried[1] and not library.extra_objects
    assert command.failures == {} and command.cuda["absent"].endswith("cannot find -lcudart_static")


def test_libraries_that_hold_other_cuda_kernels_are_built_again(build, monkeypatch, tmp_path):
    """They are newer than every source, so that nothing else would tell that FORCE_CUDA or the list of GPUs changed."""
    module = build(FORCE_CUDA="0")
    monkeypatch.setattr(build_ext, "run", lambda self: None)
    monkeypatch.setattr(module.BuildKernels, "record", lambda self: None)
    forced = []
    for facts in ({"absent": "no"}, {"absent": "no"}, {"nvcc": "13.0"}, {"nvcc": "13.0"}, {"absent": "no"}):
        monkeypatch.setattr(module.CUDA, "facts", lambda facts=facts: facts)
        command = module.BuildKernels(setuptools.Distribution())
        command.build_temp, command.force = str(tmp_path / "temp"), False
        command.run()
        forced.append(command.force)
    assert forced == [True, False, True, False, True]
