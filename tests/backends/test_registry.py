"""The choice of a backend: explicit requests, the override, the warning, and what is told to the user."""

import subprocess
import sys

import pytest
import torch

import vqkernels as vq
from vqkernels.backends import cpu, registry


def without_kernels(monkeypatch):
    """A machine whose build of the C++ kernels failed."""
    monkeypatch.setattr(cpu, "load", lambda: "the build failed: no compiler")
    monkeypatch.setattr(registry, "_choices", {})
    monkeypatch.setattr(registry, "_warned", set())


def test_an_explicit_request_never_falls_back(monkeypatch):
    without_kernels(monkeypatch)
    with pytest.raises(RuntimeError, match='backend "cpu" is unavailable: the build failed: no compiler'):
        vq.nearest_code(torch.randn(3, 2), torch.randn(2, 2), backend="cpu")
    with pytest.raises(RuntimeError, match='backend "cpu" computes CPU tensors, got a tensor on cuda'):
        registry.resolve("cpu", "cuda")


def test_auto_warns_once_and_says_why(monkeypatch):
    without_kernels(monkeypatch)
    with pytest.warns(RuntimeWarning, match="C\\+\\+ kernels are unavailable .the build failed: no compiler."):
        assert registry.resolve("auto", "cpu") == "eager"
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.resolve("auto", "cpu") == "eager"


def test_the_context_overrides_auto_alone(cpu_kernels):
    with vq.use_backend("eager"):
        assert registry.resolve("auto", "cpu") == "eager" and registry.resolve("cpu", "cpu") == "cpu"
        with vq.use_backend("cpu"):
            assert registry.resolve("auto", "cpu") == "cpu"
        assert registry.resolve("auto", "cpu") == "eager"
    with pytest.raises(ValueError, match="backend must be one of"), vq.use_backend("gpu"):
        pass


def test_a_compiled_function_follows_the_override(cpu_kernels):
    torch._dynamo.reset()
    chosen = []

    def record(gm, _):
        chosen.extend(str(n.target) for n in gm.graph.nodes if "vqkernels" in str(n.target))
        return gm.forward

    compiled = torch.compile(vq.nearest_code, backend=record, fullgraph=True)
    z, codebook = torch.randn(10, 4), torch.randn(5, 4)
    compiled(z, codebook)
    with vq.use_backend("eager"):
        compiled(z, codebook)
    assert [name.split(".")[-1] for name in chosen] == ["default", "eager"]


def test_environment_variable():
    code = "from vqkernels.backends import registry; print(registry.resolve('auto', 'cpu'))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"VQKERNELS_BACKEND": "eager", "PATH": ""},
    )
    assert out.stdout.strip() == "eager"


def test_report_names_every_backend(cpu_kernels):
    report = dict(registry.report())
    assert {"torch", "backend cpu", "backend eager", "auto on a CPU", "threads"} <= set(report)
    assert all(level in report["backend cpu"] for level in cpu.simd_levels())
