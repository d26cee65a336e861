"""What setup.py has ninja do, and what it decides about the CUDA kernels."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

import cuda_toolkit

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


def test_a_verification_vouches_for_every_file_that_the_kernels_include_and_no_other(build):
    build(FORCE_CUDA="0")
    hashed = {str(path) for path in cuda_toolkit.included(cuda_toolkit.sources())}
    assert hashed >= {"csrc/margin.h", "csrc/cuda/search.h", "csrc/bindings/views.h", "csrc/cpu/element.h"}
    assert not hashed & {"csrc/cpu/simd.h", "csrc/cpu/kernels.h", "csrc/cpu/sweep.h", "csrc/bindings/passes.h"}


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


def command_of(module):
    command = module.BuildKernels(setuptools.Distribution({"name": "vqkernels"}))
    command.build_temp, command.build_lib, command.failures, command.cuda = "temp", "lib", {}, {"nvcc": "13.0"}
    command.compiler = SimpleNamespace(compiler_so_cxx=["c++", "-fPIC"], linker_so_cxx=["c++", "-shared"])
    return command


@pytest.mark.parametrize("insisted", [False, True])
def test_a_toolkit_that_does_not_link_costs_the_cuda_kernels_alone(insisted, build, monkeypatch):
    """nvcc without the headers or the static runtime, as some package managers split it."""
    module = build(FORCE_CUDA="0")
    module.CUDA.absent, module.CUDA.insisted = "", insisted
    command, tried = command_of(module), []

    def run_ninja(self, library, cuda):
        tried.append(cuda)
        if cuda:
            raise RuntimeError("cannot find -lcudart_static")

    monkeypatch.setattr(module.BuildKernels, "run_ninja", run_ninja)
    extension = setuptools.Extension("vqkernels._ops", [])
    if insisted:
        with pytest.raises(SystemExit, match="FORCE_CUDA is set, but .* cannot find -lcudart_static"):
            command.build_extension(extension)
        return
    command.build_extension(extension)
    assert tried == [True, False]
    assert command.failures == {} and command.cuda["absent"].endswith("cannot find -lcudart_static")


def test_a_failed_build_is_recorded_and_leaves_no_library_of_an_earlier_one(build, tmp_path):
    """A compiler that says no, through ninja itself."""
    command = command_of(build(FORCE_CUDA="0"))
    command.build_temp, command.build_lib = str(tmp_path / "temp $1"), str(tmp_path / "lib")
    command.compiler.compiler_so_cxx = ["sh", "-c", "echo 'told.cpp:1: error: no'; exit 1"]
    library = Path(command.get_ext_fullpath("vqkernels._ops"))
    library.parent.mkdir(parents=True)
    library.write_text("an earlier one")
    command.build_extension(setuptools.Extension("vqkernels._ops", []))
    assert command.failures == {"vqkernels._ops": "told.cpp:1: error: no"}
    assert not library.exists()


def test_libraries_that_hold_other_cuda_kernels_are_built_again(build):
    """ninja runs a command again where it has changed: FORCE_CUDA and the list of GPUs change one."""
    module = build(FORCE_CUDA="0")
    module.CUDA.home, module.CUDA.architectures = Path("/toolkit"), [("80", False)]
    without, before = (command_of(module).ninja_file("_ops.so", cuda) for cuda in (False, True))
    module.CUDA.architectures = [("80", False), ("90a", True)]
    after = command_of(module).ninja_file("_ops.so", True)
    link = "build _ops.so: link "
    assert len({next(line for line in text.splitlines() if line.startswith(link)) for text in (without, before)}) == 2
    changed = {line for line in after.splitlines() if line not in before.splitlines()}
    assert changed and all(line.startswith("  tool = /toolkit/bin/nvcc") for line in changed)
    assert "code=compute_90a" in changed.pop()


def test_each_level_has_its_flags_and_its_rows(build):
    module = build(FORCE_CUDA="0")
    made = {path.name for path in (ROOT / "csrc" / "cpu").glob("level_*.cpp")}
    assert made == {"level_baseline.cpp", *module.LEVEL_FLAGS}
    listed = re.findall(r'\{"(\w+)",', (ROOT / "csrc" / "cpu" / "level.cpp").read_text())
    assert made == {f"level_{name}.cpp" for name in listed}


@pytest.mark.slow
def test_one_changed_body_builds_its_levels_alone(build, tmp_path):
    """Objects of a copy of the sources, by the compiler's own lists of what they include."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    command = command_of(build(FORCE_CUDA="0"))
    command.build_temp = str(tmp_path / "temp")
    (tmp_path / "build.ninja").write_text(command.ninja_file("_ops.so", cuda=False).replace("-O3", "-O0"))
    objects = [f"{command.build_temp}/csrc/cpu/{path.name}.o" for path in (tmp_path / "csrc/cpu").glob("*.cpp")]
    ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
    subprocess.run([*ninja, *objects], cwd=tmp_path, check=True, capture_output=True)

    def rebuilt_after(name: str) -> set[str]:
        path = tmp_path / "csrc" / "cpu" / name
        before = path.stat()
        path.touch()
        done = subprocess.run([*ninja, "-n", *objects], cwd=tmp_path, check=True, capture_output=True, text=True)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return set(re.findall(r"^\[\d+/\d+\] csrc/cpu/(\w+)\.cpp$", done.stdout, re.MULTILINE))

    assert rebuilt_after("sample.inl") == {"level_baseline", "level_avx2", "level_avx512"}
    assert rebuilt_after("integers.inl") == {"level_avx2", "level_avx512", "level_vnni"}
    assert rebuilt_after("entropy.inl") == {"level_baseline", "level_avx2", "level_avx512", "entropy_double"}
