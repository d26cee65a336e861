"""Builds the two native libraries of vqkernels: the operators (stable ABI, free of Python) and the optional `_C`.

Every kernel source is compiled with its own SIMD flags, chosen by its file name, and contraction of a*b+c off: the
exactness contract needs every rounding where the source shows it. Where no compiler works, the package still installs;
the reason is written to `vqkernels/_build.json`, `vqkernels info` shows it, and the eager backend serves.
"""

import json
import platform
import re
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

STABLE_ABI = "0x020a000000000000"  # torch 2.10: the oldest torch that the built library serves
X86 = platform.machine().lower() in ("x86_64", "amd64")
LEVEL_FLAGS = (
    {
        "_avx2.cpp": ["-march=x86-64-v3"],
        "_avx512.cpp": ["-march=x86-64-v4"],
        "_vnni.cpp": ["-march=x86-64-v4", "-mavx512vnni"],
    }
    if X86
    else {}
)
# gcc 12's own AVX-512 headers warn about registers that are undefined on purpose.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall",
         "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-attributes"]  # fmt: skip


def operators() -> Extension:
    """The operator library: no Python symbol, only the stable ABI of libtorch."""
    import torch
    from torch.utils.cpp_extension import include_paths

    return Extension(
        "vqkernels._ops",
        sources=sorted(glob("csrc/cpu/*.cpp"))
        + sorted(set(glob("csrc/bindings/*.cpp")) - {"csrc/bindings/python.cpp"}),
        depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inl", recursive=True),
        include_dirs=include_paths(),
        library_dirs=[str(Path(torch.__file__).parent / "lib")],
        libraries=["torch", "torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        extra_compile_args=FLAGS,
        language="c++",
    )


def information() -> Extension:
    """The pybind11 module `_C`: facts and kernel entry points for tests; nothing at run time needs it."""
    import pybind11

    return Extension(
        "vqkernels._C",
        sources=[*sorted(glob("csrc/cpu/*.cpp")), "csrc/bindings/python.cpp"],
        depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inl", recursive=True),
        include_dirs=[pybind11.get_include()],
        extra_compile_args=FLAGS,
        language="c++",
    )


class BuildKernels(build_ext):
    """Compiles each source with the flags of its SIMD level, and records a failure instead of raising it."""

    def run(self) -> None:
        self.failures: dict[str, str] = {}
        super().run()
        self.record()

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def with_level(obj, src, ext, cc_args, extra_postargs, pp_opts):
            level = next((flags for suffix, flags in LEVEL_FLAGS.items() if src.endswith(suffix)), [])
            try:
                return compile_one(obj, src, ext, cc_args, [*extra_postargs, *level], pp_opts)
            except Exception as error:
                raise RuntimeError(f"{self.compiler.compiler_so_cxx[0]} could not compile {src}") from error

        self.compiler._compile = with_level
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # any compiler, on any machine: the reason is kept for the user, not lost
            reason = re.sub(r"\s+", " ", str(error)).strip()[:200]
            self.failures[ext.name] = reason
            # A library of an earlier build must not pass for this one.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            print(f"warning: {ext.name} was not built ({reason}); the eager backend will serve")

    def copy_extensions_to_source(self) -> None:
        self.extensions = [ext for ext in self.extensions if ext.name not in self.failures]
        super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def record(self) -> None:
        import torch

        facts = {
            "torch": torch.__version__,
            "compiler": " ".join(self.compiler.compiler_cxx or []),
            "failures": self.failures,
        }
        package = Path(__file__).parent / "vqkernels" if self.inplace else Path(self.build_lib) / "vqkernels"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(facts, indent=1) + "\n")


class BuildPython(build_py):
    """Leaves build products of the source tree out of the wheel: `BuildKernels` writes the wheel's own."""

    exclude = ("_build.json",)

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        return [path for path in super().find_data_files(package, src_dir) if Path(path).name not in self.exclude]


def extensions() -> list[Extension]:
    try:
        return [operators(), information()]
    except ImportError as error:
        print(f"warning: building without native kernels: {error}")
        return []


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels, "build_py": BuildPython})
