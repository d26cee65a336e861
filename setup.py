"""Builds the native library of vqkernels, `_ops`: the operators for the stable ABI of torch, free of Python.

ninja compiles what has changed. csrc/cpu/level_<name>.cpp has the flags of its SIMD level. Contraction of a*b+c is off:
the exactness contract needs every rounding where the source shows it. Where no compiler works, the package still
installs; the reason is written to `vqkernels/_build.json`, `vqkernels info` shows it, and the eager backend serves.

Where cuda_toolkit.py finds a toolkit, nvcc compiles the CUDA kernels (csrc/cuda) into the same library, which links the
CUDA runtime statically: it loads under a CPU-only torch and without a driver.
"""

import importlib.metadata
import importlib.util
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a build with isolation has it nowhere
from cuda_toolkit import Toolkit
from cuda_toolkit import sources as cuda_sources

STABLE_ABI = "0x020a000000000000"  # torch 2.10: the oldest torch that the built library serves
X86 = platform.machine().lower() in ("x86_64", "amd64")
LEVEL_FLAGS = {  # on x86-64; elsewhere these sources are empty
    "level_avx2.cpp": ["-march=x86-64-v3"],
    "level_avx512.cpp": ["-march=x86-64-v4"],
    "level_vnni.cpp": ["-march=x86-64-v4", "-mavx512vnni"],
}
# gcc 12's own AVX-512 headers warn about registers that are undefined on purpose.
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall",
         "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-attributes"]  # fmt: skip
CUDA = Toolkit()
RULES = """\
rule compile
  command = $tool -MD -MF $out.d -c $in -o $out
  description = $in
  depfile = $out.d
  deps = gcc
rule link
  command = $tool $in -o $out $libraries
  description = $out
"""


def escaped(path: str) -> str:
    """A path in a line of build.ninja."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def words(command: list[str]) -> str:
    """A command in a line of build.ninja."""
    return shlex.join(command).replace("$", "$$")


class BuildKernels(build_ext):
    """Builds the library by ninja, and records a failure instead of raising it."""

    def run(self) -> None:
        self.failures: dict[str, str] = {}
        self.cuda = CUDA.facts()
        super().run()
        self.record()

    def ninja_file(self, library: str, cuda: bool) -> str:
        """A compilation for each source, and the link of the library."""
        home = Path(importlib.util.find_spec("torch").origin).parent
        compiler = [*self.compiler.compiler_so_cxx, *FLAGS, f"-DTORCH_TARGET_VERSION={STABLE_ABI}", f"-I{home}/include"]
        libraries = [f"-L{home}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
        libraries += CUDA.libraries() if cuda else []
        sources = sorted({*glob("csrc/cpu/*.cpp"), *glob("csrc/bindings/*.cpp")} - set(cuda_sources()))
        sources = cuda_sources() * cuda + sources
        lines, objects = [f"builddir = {escaped(self.build_temp)}", RULES], []
        for source in sources:
            command = CUDA.command() if source.endswith(".cu") else list(compiler)
            command += LEVEL_FLAGS.get(Path(source).name, []) if X86 else []
            command += [f"-I{CUDA.home}/include"] if source in cuda_sources() else []
            objects.append(escaped(f"{self.build_temp}/{source}.o"))
            lines += [f"build {objects[-1]}: compile {source}", f"  tool = {words(command)}"]
        lines.append(f"build {escaped(library)}: link {' '.join(objects)}")
        lines += [f"  tool = {words(self.compiler.linker_so_cxx)}", f"  libraries = {words(libraries)}"]
        return "\n".join([*lines, ""])

    def run_ninja(self, library: str, cuda: bool) -> None:
        """Builds the library; raises RuntimeError with the first error."""
        if not importlib.util.find_spec("ninja") and not shutil.which("ninja"):
            raise RuntimeError("ninja is not found: pip install ninja")
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        path = Path(self.build_temp) / "build.ninja"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.ninja_file(library, cuda))
        running = subprocess.Popen([*ninja, "-f", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = []
        for line in running.stdout:
            print(line, end="", flush=True)
            said.append(line)
        if running.wait():
            after = 2 + next((number for number, line in enumerate(said) if line.startswith("FAILED")), -2)
            errors = [line for line in said[after:] if re.search("error|not found|cannot find", line)]
            raise RuntimeError(re.sub(r"\s+", " ", [*errors, "ninja failed"][0]).strip()[:200])

    def build_extension(self, ext: Extension) -> None:
        """A toolkit without its headers or its runtime must not cost the CPU's kernels."""
        library = self.get_ext_fullpath(ext.name)
        try:
            try:
                self.run_ninja(library, cuda=not CUDA.absent)
            except Exception as error:
                if CUDA.absent:
                    raise
                if CUDA.insisted:
                    raise SystemExit(f"FORCE_CUDA is set, but the library does not build with CUDA: {error}") from error
                self.cuda = {"absent": f"the library does not build with CUDA: {error}"}
                print(f"warning: the CUDA kernels were not built ({error})")
                self.run_ninja(library, cuda=False)
        except Exception as error:  # any compiler, on any machine: the reason is kept for the user, not lost
            self.failures[ext.name] = str(error)
            Path(library).unlink(missing_ok=True)  # that of an earlier build
            print(f"warning: {ext.name} was not built ({error}); the eager backend will serve")

    def copy_extensions_to_source(self) -> None:
        if not self.failures:
            return super().copy_extensions_to_source()
        Path(self.get_ext_fullpath("vqkernels._ops")).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def record(self) -> None:
        torch, compiler = importlib.metadata.version("torch"), " ".join(self.compiler.compiler_cxx or [])
        facts = {"torch": torch, "compiler": compiler, "failures": self.failures, "cuda": self.cuda}
        package = Path(__file__).parent / "vqkernels" if self.inplace else Path(self.build_lib) / "vqkernels"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(facts, indent=1) + "\n")


if importlib.util.find_spec("torch"):
    setup(ext_modules=[Extension("vqkernels._ops", sources=[])], cmdclass={"build_ext": BuildKernels})
else:
    print("warning: torch is not installed: building without native kernels")
    setup()
