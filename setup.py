"""Builds the two native libraries of vqkernels: the operators (stable ABI, free of Python) and the optional `_C`.

Every kernel source is compiled with its own SIMD flags, chosen by its file name, and contraction of a*b+c off: the
exactness contract needs every rounding where the source shows it. Where no compiler works, the package still installs;
the reason is written to `vqkernels/_build.json`, `vqkernels info` shows it, and the eager backend serves.

The CUDA kernels (csrc/cuda) are compiled by nvcc into objects of the same operator library, which links the CUDA
runtime statically: it loads under a CPU-only torch and without a driver. They are built where nvcc is found and the
torch of the build knows CUDA. FORCE_CUDA=1 insists, FORCE_CUDA=0 leaves them out, TORCH_CUDA_ARCH_LIST="8.0;9.0a"
names the GPUs.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
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
# No contraction on the GPU either: where a kernel may round once, it says fma.
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false"]
CUDA_ARCHITECTURES = "8.0;9.0a;10.0+PTX"  # the last one's PTX serves what comes after it
CUDA_BINDINGS = "csrc/bindings/cuda_*.cpp"
CUDA_SOURCES = ("csrc/cuda/*", "csrc/*.h", "csrc/cpu/*.h", "csrc/bindings/*.h", CUDA_BINDINGS)
NAMED_ARCHITECTURES = {
    **dict.fromkeys(("Kepler+Tegra", "Kepler", "Maxwell+Tegra", "Maxwell", "Pascal", "Volta", "Turing"), "7.5"),
    "Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0a", "Blackwell+Tegra": "11.0", "Blackwell": "10.0;12.0",
}  # fmt: skip


class Cuda:
    """The CUDA toolkit of this build, or why the build does without one."""

    def __init__(self) -> None:
        wanted = os.environ.get("FORCE_CUDA", "")
        self.insisted = wanted not in ("", "0")
        self.home = self._home()
        self.architectures, misread = self._architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES)
        self.absent = self._absence(wanted, misread)
        if self.absent and self.insisted:
            raise SystemExit(f"FORCE_CUDA is set, but {self.absent}")

    @staticmethod
    def _home() -> Path | None:
        found = shutil.which("nvcc")
        places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        places.append(str(Path(found).resolve().parents[1]) if found else None)
        return next((Path(place) for place in places if place and (Path(place) / "bin" / "nvcc").exists()), None)

    @staticmethod
    def _architectures(listed: str) -> tuple[list[tuple[str, bool]], str]:
        """("90a", with its PTX) of each entry of TORCH_CUDA_ARCH_LIST, and what is wrong with it, or "".

        The kernels need 8.0 or newer: what is older is passed over.
        """
        for name, numbers in NAMED_ARCHITECTURES.items():
            listed = listed.replace(name, numbers)
        found = []
        for entry in re.findall(r"[^;,\s]+", listed):
            number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
            if number is None:
                return [], f"TORCH_CUDA_ARCH_LIST must hold entries like 8.0, 9.0a or 10.0+PTX, got {entry!r}"
            if int(number[1]) >= 8:
                found.append((number[1] + number[2] + number[3], number[4] is not None))
        return found, ""

    def _absence(self, wanted: str, misread: str) -> str:
        if wanted == "0":
            return "FORCE_CUDA=0 leaves the CUDA kernels out"
        if self.home is None:
            return "nvcc is not found: set CUDA_HOME to the CUDA toolkit"
        if misread:
            return misread
        if not self.architectures:
            return "TORCH_CUDA_ARCH_LIST names no GPU of compute capability 8.0 or newer"
        if not self.insisted:
            try:
                import torch
            except ImportError:
                return "torch is not installed"
            if torch.version.cuda is None:
                return "the torch of the build is without CUDA: FORCE_CUDA=1 builds the CUDA kernels all the same"
        return ""

    def facts(self) -> dict[str, object]:
        """What `vqkernels info` tells of this build."""
        if self.absent:
            return {"absent": self.absent}
        told = subprocess.run(
            [str(self.home / "bin" / "nvcc"), "--version"], capture_output=True, text=True, check=True
        )
        version = re.search(r"release ([\d.]+)", told.stdout)
        chips = [f"sm_{chip}" + " and its PTX" * ptx for chip, ptx in self.architectures]
        return {"nvcc": version[1] if version else "unknown", "architectures": chips, "source": self._source_hash()}

    @staticmethod
    def _source_hash() -> str:
        """Of everything that can change what the kernels do: a verification vouches for it."""
        digest = hashlib.sha256(repr(CUDA_FLAGS).encode())
        for path in sorted({path for pattern in CUDA_SOURCES for path in glob(pattern)}):
            digest.update(path.encode() + b"\0" + Path(path).read_bytes() + b"\0")
        return digest.hexdigest()[:16]

    def compile(self, folder: Path) -> list[str]:
        """Compiles every source of csrc/cuda to an object in `folder`; returns the objects.

        Raises:
            RuntimeError: with nvcc's first error.
        """
        folder.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip, _ in self.architectures]
        targets += [f"-gencode=arch=compute_{chip},code=compute_{chip}" for chip, ptx in self.architectures if ptx]
        hidden = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]

        def compile_one(source: str) -> str:
            made = str(folder / f"{Path(source).stem}.cuda.o")
            command = [str(self.home / "bin" / "nvcc"), *CUDA_FLAGS, *targets, *hidden, "-c", source, "-o", made]
            print(" ".join(command), flush=True)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
                raise RuntimeError(f"nvcc could not compile {source}: {error}")
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile_one, sorted(glob("csrc/cuda/*.cu"))))


CUDA = Cuda()


def headers() -> list[str]:
    return [path for end in ("h", "inl", "cu", "cuh") for path in glob(f"csrc/**/*.{end}", recursive=True)]


def operators() -> Extension:
    """The operator library: no Python symbol, only the stable ABI of libtorch."""
    import torch
    from torch.utils.cpp_extension import include_paths

    others = {"csrc/bindings/python.cpp", *glob(CUDA_BINDINGS)}
    return Extension(
        "vqkernels._ops",
        sources=sorted(glob("csrc/cpu/*.cpp")) + sorted(set(glob("csrc/bindings/*.cpp")) - others),
        depends=headers(),
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
        depends=headers(),
        include_dirs=[pybind11.get_include()],
        extra_compile_args=FLAGS,
        language="c++",
    )


class BuildKernels(build_ext):
    """Compiles each source with the flags of its SIMD level, and records a failure instead of raising it."""

    def run(self) -> None:
        self.failures: dict[str, str] = {}
        self.cuda = CUDA.facts()
        # The libraries of an earlier build, with other CUDA kernels or without them, are newer than every source.
        built_with = Path(self.build_temp) / "cuda.json"
        if not built_with.exists() or json.loads(built_with.read_text()) != self.cuda:
            self.force = True
        super().run()
        built_with.parent.mkdir(parents=True, exist_ok=True)
        built_with.write_text(json.dumps(self.cuda))
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
        if not CUDA.absent:
            self.add_cuda()
        super().build_extensions()

    def add_cuda(self) -> None:
        """Adds the CUDA kernels to the operator library, or records why they do not compile."""
        library = next((ext for ext in self.extensions if ext.name == "vqkernels._ops"), None)
        if library is None:
            return
        try:
            library.extra_objects += CUDA.compile(Path(self.build_temp) / "cuda")
        except Exception as error:
            if CUDA.insisted:
                raise SystemExit(f"FORCE_CUDA is set, but {error}") from error
            self.cuda = {"absent": re.sub(r"\s+", " ", str(error)).strip()[:200]}
            print(f"warning: the CUDA kernels were not built ({error})")
            return
        library.sources += sorted(glob(CUDA_BINDINGS))
        library.include_dirs.append(str(CUDA.home / "include"))
        library.library_dirs += [str(path) for name in ("lib64", "lib") if (path := CUDA.home / name).is_dir()]
        library.libraries += ["cudart_static", "dl", "rt", "pthread"]

    def without_cuda(self, ext: Extension, error: Exception) -> None:
        """Builds the library once more: a toolkit without its headers or runtime must not cost the CPU's kernels."""
        if CUDA.insisted:
            raise SystemExit(f"FORCE_CUDA is set, but the library does not build with CUDA: {error}") from error
        self.cuda = {"absent": re.sub(r"\s+", " ", f"the library does not build with CUDA: {error}")[:200]}
        print(f"warning: the CUDA kernels were not built ({error})")
        plain = operators()
        for name in ("sources", "include_dirs", "library_dirs", "libraries", "extra_objects"):
            setattr(ext, name, getattr(plain, name))
        super().build_extension(ext)

    def build_extension(self, ext: Extension) -> None:
        try:
            try:
                super().build_extension(ext)
            except Exception as error:
                if not ext.extra_objects:
                    raise
                self.without_cuda(ext, error)
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
            "cuda": self.cuda,
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
