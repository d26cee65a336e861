"""The import law: floors only downward, no circles, backends apart. All of it is read from the imports themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import vqkernels

ROOT = Path(vqkernels.__file__).parent
FLOORS = ["reference", "backends", "ops", "nn", "models", "training", "cli"]
RANK = {name: rank for rank, name in enumerate(FLOORS)} | {"dropin": 4, "bench": 4, "verification": 4, "version": 0}
# Backends that import nothing from one another. (`cpu` loads the operator library, in which the CUDA kernels are, too.)
APART = ("triton", "cuda", "eager")


def modules() -> dict[str, Path]:
    return {str(path.relative_to(ROOT).with_suffix("")): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name: str, path: Path) -> set[str]:
    """Files of the package that a file imports, at any depth of its code."""
    known, found = modules(), set()
    package = list(Path(name).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        targets = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else None
            if base is None:
                if not (node.module or "").startswith("vqkernels"):
                    continue
                base = (node.module or "").split(".")[1:]
            elif node.module:
                base = base + node.module.split(".")
            targets = [base + [alias.name] for alias in node.names] + [base]
        elif isinstance(node, ast.Import):
            targets = [a.name.split(".")[1:] for a in node.names if a.name.split(".")[0] == "vqkernels"]
        for target in targets:
            for candidate in ("/".join(target), "/".join([*target, "__init__"])):
                if candidate in known and candidate != name:
                    found.add(candidate)
    return found


def floor(name: str) -> str:
    return name.split("/")[0]


def test_no_file_imports_upward():
    for name, path in modules().items():
        if floor(name) not in RANK:
            continue
        for other in imports(name, path):
            if floor(other) in RANK:
                assert RANK[floor(other)] <= RANK[floor(name)], f"{name} imports upward: {other}"


def backend_of(name: str) -> str | None:
    """Which backend a file of the floor of backends belongs to; None: it is shared, or chooses among them."""
    part = name.split("/")[1] if floor(name) == "backends" else ""
    return next((backend for backend in APART if part == backend or part.startswith(f"{backend}_")), None)


def test_backends_are_apart():
    """A backend's kernels import no other backend's."""
    found = {name: backend_of(name) for name in modules()}
    assert set(APART) <= set(found.values())
    for name, path in modules().items():
        for other in imports(name, path):
            both = found[name] and found[other]
            assert not both or found[name] == found[other], f"{name} imports {other}"


def test_no_cycles():
    graph = {name: {o for o in imports(name, path) if not o.endswith("__init__")} for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_package_is_light():
    """Importing vqkernels imports neither models nor training nor drop-ins, and nothing that only some users have."""
    code = "import sys, torch; before = set(sys.modules); import vqkernels; print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = [name.split(".") for name in run.stdout.split()]
    ours = {name[1] for name in loaded if name[0] == "vqkernels" and len(name) > 1}
    assert ours & RANK.keys() == {"backends", "nn", "ops", "reference", "version"}
    foreign = {name[0] for name in loaded} - {"vqkernels", "torch", "numpy"} - sys.stdlib_module_names
    assert not foreign, f"import vqkernels imports {foreign}"
