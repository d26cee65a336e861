"""Compiles a native driver of this folder with the raw kernels of csrc/cpu and the flags of setup.py, without torch."""

import ast
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def compiler() -> str | None:
    """The C++ compiler that a build of the package would use, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


def compiler_version() -> str:
    """Name and major version, such as "g++ 12": instruction counts are compared within one of them only."""
    told = subprocess.run([compiler() or "c++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    name = "clang" if "clang" in _first_line() else "g++"
    return f"{name} {told.strip().partition('.')[0]}, {platform.machine()}"


def _first_line() -> str:
    return subprocess.run([compiler() or "c++", "--version"], capture_output=True, text=True, check=True).stdout


def flags() -> tuple[list[str], dict[str, list[str]]]:
    """The flags of every source, and those of the source of each SIMD level by its name, from setup.py."""
    found: dict[str, ast.expr] = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return ast.literal_eval(found["FLAGS"]), ast.literal_eval(found["LEVEL_FLAGS"]) if x86 else {}


def build(driver: str, folder: Path, *extra: str) -> Path:
    """Compiles tests/native/`driver`.cpp and every kernel with `extra` flags after the usual ones; returns the program.

    Raises:
        RuntimeError: a source does not compile or link, with what the compiler said.
    """
    common, levels = flags()
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), HERE / f"{driver}.cpp"]

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")

    def compile_one(source: Path) -> str:
        out = folder / f"{source.stem}.o"
        run([compiler() or "c++", *common, *extra, *levels.get(source.name, []), "-c", str(source), "-o", str(out)])
        return str(out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / driver
    run([compiler() or "c++", *extra, *objects, "-o", str(program)])
    return program


def build_host_program(driver: str, folder: Path) -> Path:
    """Compiles tests/native/`driver`.cpp alone: the block programs of csrc/cuda, which are headers, run on the CPU.

    Raises:
        RuntimeError: it does not compile, with what the compiler said.
    """
    program = folder / driver
    command = [compiler() or "c++", "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-ffp-contract=off"]
    done = subprocess.run(
        [*command, str(HERE / f"{driver}.cpp"), "-o", str(program)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return program


def build_host_library(driver: str, folder: Path) -> Path:
    """The same as a shared library, for drivers whose functions Python calls through ctypes."""
    library = folder / f"{driver}.so"
    command = [
        compiler() or "c++",
        "-std=c++17",
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-Wall",
        "-Wextra",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
    ]
    done = subprocess.run(
        [*command, str(HERE / f"{driver}.cpp"), "-o", str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return library


def verdicts(driver: str, folder: Path) -> dict[str, str]:
    """What each named check of a driver found: "" where it held, else one sentence."""
    done = subprocess.run([str(build_host_program(driver, folder))], capture_output=True, text=True, check=False)
    found = {}
    for line in done.stdout.splitlines():
        name, colon, wrong = line.partition(": ")
        found[name if colon else line.removesuffix(" ok")] = wrong
    if done.returncode:
        found["the program"] = f"ended with {done.returncode}: {done.stderr[-500:]}"
    return found
