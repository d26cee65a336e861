"""What a change of the house must not change: public names, state-dict keys, commands' options, operators' bits.

    python tests/invariants.py            compares this tree with tests/invariants.json
    python tests/invariants.py --record   writes what this tree gives into it, for what this machine can compute
    python tests/invariants.py --cases F  writes the hash of every single case to F, to find one that differs

The bits of an operator depend on the backend and on the SIMD level of its kernels. What torch computes besides (random
numbers, sums, products) depends on its own instructions and on the CPU; so each hash has the names of all that it
depends on in its key, and a machine compares the keys that it can give. No GPU is needed, and none is recorded: the
tests of the Triton and CUDA kernels compare them with the reference.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

RECORD = Path(__file__).with_suffix(".json")
# Torch's own instructions are those that every x86-64 machine of today has.
SETTINGS = {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2", "VQKERNELS_SIMD": "", "VQKERNELS_BACKEND": "auto"}
if __name__ == "__main__":
    os.environ |= SETTINGS

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from wrappers.cells import CELLS, LAYERS  # noqa: E402

import vqkernels.dropin  # noqa: E402
from vqkernels.backends import cpu  # noqa: E402
from vqkernels.models import VAE, VQVAE, PixelCNN, TransformerPrior  # noqa: E402
from vqkernels.ops.quantize import quantize_with_statistics  # noqa: E402
from vqkernels.ops.residual import residual_quantize_with_statistics  # noqa: E402
from vqkernels.verification.adversaries import ADVERSARIES  # noqa: E402
from vqkernels.verification.layouts import LAYOUTS  # noqa: E402

SIZE = (257, 61, 24)
METRICS = ("euclidean", "dot", "cosine")
COMMANDS = ("train", "sample", "encode", "decode", "compare", "demo", "info", "verify", "bench", "swap", "attack")
Case = tuple[str, Callable[[], list[Tensor]]]


def public_names() -> dict[str, list[str]]:
    """The names of the public modules, with the signatures of classes and functions."""
    modules = ["vqkernels", "vqkernels.nn", "vqkernels.models", "vqkernels.dropin.lucidrains"]
    modules += [f"vqkernels.dropin.{found.name}" for found in pkgutil.iter_modules(vqkernels.dropin.__path__)]
    return {module: sorted(_signatures(importlib.import_module(module))) for module in modules}


def _signatures(module: ModuleType) -> Iterator[str]:
    """Of `__all__`, or of the classes and functions that the module defines."""
    own = [name for name, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
    for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
        x = getattr(module, name)
        signature = str(inspect.signature(x)) if inspect.isfunction(x) or isinstance(x, type) else ""
        yield name + re.sub(" at 0x[0-9a-f]+", "", signature)


def state_keys() -> dict[str, list[str]]:
    """Keys and shapes of every layer, drop-in and model in every mode."""
    modules: dict[str, torch.nn.Module] = {}
    for name, (layer, mode) in CELLS.items():
        modules[name] = LAYERS[layer].build(**LAYERS[layer].modes[mode])
    modules["VQVAE"] = VQVAE(3, hidden_channels=8, code_dim=4, codebook_size=12)
    modules["VAE"] = VAE(3, hidden_channels=8, code_dim=4, likelihood="gaussian")
    modules["PixelCNN"] = PixelCNN(12, hidden_channels=8, num_layers=2, num_classes=3)
    modules["TransformerPrior"] = TransformerPrior(12, hidden_channels=8, num_layers=2, num_heads=2, max_grid=(4, 4))
    return {
        name: sorted(f"{key} {list(x.shape)}" for key, x in module.state_dict().items() if isinstance(x, Tensor))
        for name, module in sorted(modules.items())
    }


def command_options() -> dict[str, list[str]]:
    """The options that the help of every command lists."""
    found = {}
    for name in COMMANDS:
        command = [sys.executable, "-W", "ignore", "-m", "vqkernels", name, "--help"]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"})
        found[name] = sorted(set(re.findall(r"(?:^|│) *(--[a-z][\w.-]*)", text.stdout, re.MULTILINE)))
    return found


def operator_cases(backend: str) -> dict[str, list[Case]]:
    """Every operator on the adversaries' data, in every metric, dtype, layout and mode of gradient that it has."""
    return {
        "nearest": list(_nearest(backend)),
        "quantize": list(_quantize(backend)),
        "lookup, statistics": list(_given(backend)),
        "residual": list(_residual(backend)),
        "sample": list(_sample(backend)),
        "entropy": list(_entropy(backend)),
    }


def _nearest(backend: str) -> Iterator[Case]:
    for name, make in ADVERSARIES.items():
        for metric in METRICS:
            for precision in ("exact", "fast"):

                def case(make=make, metric=metric, precision=precision) -> list[Tensor]:
                    z, codes = make(*SIZE)
                    return [vqkernels.nearest_code(z, codes, metric=metric, precision=precision, backend=backend)]

                yield f"{name}, {metric}, {precision}", case


def _quantize(backend: str) -> Iterator[Case]:
    for name, make in ADVERSARIES.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):

            def case(make=make, dtype=dtype) -> list[Tensor]:
                return _training_step(backend, *(x.to(dtype) for x in make(*SIZE)))

            yield f"{name}, {dtype}", case
    for layout, arrange in LAYOUTS.items():
        for gradient in ("straight_through", "rotation"):

            def laid_out(arrange=arrange, gradient=gradient) -> list[Tensor]:
                z, channel_dim, codes, mask = arrange(True, torch.device("cpu"))
                return _training_step(backend, z, codes, channel_dim=channel_dim, mask=mask, gradient=gradient)

            yield f"{layout}, {gradient}", laid_out


def _training_step(backend: str, z: Tensor, codes: Tensor, **options) -> list[Tensor]:
    """Every output, and the gradients of their weighted sum."""
    z, codes = z.detach().requires_grad_(), codes.detach().requires_grad_()
    result = quantize_with_statistics(z, codes, backend=backend, **options)
    weight = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).view(z.shape).to(z.dtype)
    total = (result.quantized * weight).sum() + 0.5 * result.commitment_loss + 2 * result.codebook_loss
    return [*result, *torch.autograd.grad(total, (z, codes))]


def _given(backend: str) -> Iterator[Case]:
    for name, make in ADVERSARIES.items():

        def case(make=make) -> list[Tensor]:
            z, codes = make(*SIZE)
            indices = torch.arange(len(z)) * 7 % len(codes)
            counted = vqkernels.codebook_statistics(z, indices, len(codes), backend=backend)
            return [*quantize_with_statistics(z, codes, indices=indices, backend=backend), *counted]

        yield name, case


def _residual(backend: str) -> Iterator[Case]:
    for name, make in ADVERSARIES.items():
        for metric in METRICS:

            def case(make=make, metric=metric) -> list[Tensor]:
                z, codes = make(*SIZE)
                z, stack = z.requires_grad_(), torch.stack([codes, codes / 4, codes / 16]).requires_grad_()
                result = residual_quantize_with_statistics(z, stack, metric=metric, backend=backend)
                total = result.quantized.sum() + result.commitment_losses.sum() + 2 * result.codebook_losses.sum()
                return [*result, *torch.autograd.grad(total, (z, stack))]

            yield f"{name}, {metric}", case


def _sample(backend: str) -> Iterator[Case]:
    for name, make in ADVERSARIES.items():

        def case(make=make) -> list[Tensor]:
            return [vqkernels.sample_code(*make(*SIZE), temperature=0.7, seed=torch.tensor(5), backend=backend)]

        yield name, case


def _entropy(backend: str) -> Iterator[Case]:
    for name in ("gaussian", "clustered", "collapsed", "offset 1e2", "non-finite rows"):
        for dtype in (torch.float32, torch.float64):

            def case(name=name, dtype=dtype) -> list[Tensor]:
                z, codes = (x.to(dtype).requires_grad_() for x in ADVERSARIES[name](*SIZE))
                result = vqkernels.entropy_loss(z, codes, temperature=0.5, backend=backend)
                return [*result, *torch.autograd.grad(result[0] - 2 * result[1], (z, codes))]

            yield f"{name}, {dtype}", case


def _kmeans(backend: str) -> Iterator[Case]:
    for name in ("gaussian", "clustered", "duplicated codes", "half-integer lattice"):

        def case(name=name) -> list[Tensor]:
            return [*vqkernels.kmeans(ADVERSARIES[name](*SIZE)[0], 20, seed=3, backend=backend)]

        yield name, case


def composed_cases(backend: str) -> dict[str, list[Case]]:
    """What is composed of operators and of torch's own: k-means, and the prior's training and sampling."""

    def model(dtype: torch.dtype) -> PixelCNN:
        return PixelCNN(24, hidden_channels=16, num_layers=3, num_classes=4, head_channels=20).to(dtype)

    def training(dtype: torch.dtype) -> list[Tensor]:
        prior = model(dtype)
        codes = torch.arange(3 * 7 * 6).view(3, 7, 6) * 5 % 24
        logits = prior(codes, torch.tensor([0, 2, 3]))
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad for p in prior.parameters() if p.grad is not None)]

    def sampling(dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        labels = torch.tensor([1, 3])
        return [model(dtype).eval().sample((2, 5, 6), labels=labels, top_k=9, generator=generator)]

    types = (torch.float32, torch.float64)
    return {
        "kmeans": list(_kmeans(backend)),
        "pixelcnn training": [(str(dtype), lambda dtype=dtype: training(dtype)) for dtype in types],
        "pixelcnn sampling": [(str(dtype), lambda dtype=dtype: sampling(dtype)) for dtype in types],
    }


def operators() -> dict[str, str]:
    """A hash of every case: "who computes: operator: case"."""
    torch.set_num_threads(2)
    torch_kind = torch.backends.cpu.get_cpu_capability()
    facts = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    chip = " ".join(facts.get(name, "?") for name in ("vendor_id", "cpu family", "model"))
    found = {}
    for level in cpu.simd_levels():
        with simd(level):
            for operator, cases in operator_cases("cpu").items():
                found |= _hashes(f"cpu {level}, {torch_kind}: {operator}", cases)
            for operator, cases in composed_cases("cpu").items():
                found |= _hashes(f"cpu {level}, {torch_kind}, {chip}: {operator}", cases)
    for operator, cases in operator_cases("eager").items():
        found |= _hashes(f"eager, {torch_kind}, {chip}: {operator}", cases)
    return found


@contextmanager
def simd(level: str) -> Iterator[None]:
    before = os.environ.get("VQKERNELS_SIMD", "")
    os.environ["VQKERNELS_SIMD"] = level
    try:
        yield
    finally:
        os.environ["VQKERNELS_SIMD"] = before


def _hashes(who: str, cases: list[Case]) -> dict[str, str]:
    found = {}
    for name, compute in cases:
        torch.manual_seed(11)
        digest = hashlib.sha256()
        for x in compute():
            # The bits of a NaN are no promise.
            x = torch.where(x.isnan(), torch.zeros_like(x), x) if x.is_floating_point() else x
            digest.update(f"{x.dtype}{list(x.shape)}".encode())
            digest.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        found[f"{who}: {name}"] = digest.hexdigest()
    return found


def by_operator(hashes: dict[str, str]) -> dict[str, str]:
    """One hash for all cases of an operator by one that computes."""
    found: dict[str, list[str]] = {}
    for key, value in hashes.items():
        found.setdefault(": ".join(key.split(": ")[:2]), []).append(value)
    return {key: hashlib.sha256("".join(values).encode()).hexdigest()[:16] for key, values in found.items()}


def differences(recorded: dict, seen: dict) -> list[str]:
    """What is not as it was recorded, a line each; operators of another kind of machine are passed over."""
    lines = []
    for part in ("names", "states", "options"):
        for key in sorted(recorded[part].keys() | seen[part].keys()):
            before, after = (set(side[part].get(key, [])) for side in (recorded, seen))
            if before != after:
                lines.append(f"{part}: {key}: gone {sorted(before - after)}, new {sorted(after - before)}")
    for key, value in recorded["operators"].items():
        if seen["operators"].get(key, value) != value:
            lines.append(f"operators: {key}: other bits")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write what this tree gives to tests/invariants.json")
    parser.add_argument("--cases", type=Path, help="write the hash of every case to this file")
    options = parser.parse_args()
    hashes = operators()
    if options.cases:
        options.cases.write_text(json.dumps(hashes, indent=0) + "\n")
        return
    seen = {"names": public_names(), "states": state_keys(), "options": command_options()}
    seen["operators"] = by_operator(hashes)
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {"operators": {}}
    if options.record:
        seen["operators"] = recorded["operators"] | seen["operators"]
        RECORD.write_text(json.dumps(seen, indent=1, sort_keys=True) + "\n")
        return
    lines = differences(recorded, seen)
    compared = len(seen["operators"].keys() & recorded["operators"].keys())
    print("\n".join(lines) or f"as recorded; {compared} operators compared")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
