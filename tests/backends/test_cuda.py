"""The CUDA backend without a GPU: what was built, whom it serves, and its operators through the executor."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from native.build import compiler

import vqkernels as vq
from vqkernels.backends import cpu, cuda, proof, registry, triton, verified
from vqkernels.backends.cuda import statistics
from vqkernels.cli import verify as command
from vqkernels.verification import suite

ROOT = Path(__file__).parents[2]
HOPPER = proof.Gpu(0, "NVIDIA H200", (9, 0))
ADA = proof.Gpu(1, "NVIDIA L4", (8, 9))
BUILD = {"nvcc": "13.0", "architectures": ["sm_80", "sm_90a"], "source": "0123"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets the GPUs of a machine without Triton whose build has CUDA kernels, and an empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton, "problem", lambda: "triton is not installed: pip install triton")
    monkeypatch.setattr(cuda, "build", lambda: BUILD)
    monkeypatch.setattr(cpu, "load", lambda: None)
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(registry, "_override", "auto")

    def having(*gpus):
        monkeypatch.setattr(proof, "_states", {})
        monkeypatch.setattr(registry, "_choices", {})
        monkeypatch.setattr(proof, "visible", lambda: list(gpus))

    return having


def test_auto_takes_the_cuda_kernels_only_where_they_were_verified(machine):
    machine(HOPPER, ADA)
    unproved = "not installed.*, and the CUDA kernels are not verified on GPU {}.*verify --backend cuda"
    with pytest.warns(RuntimeWarning, match=unproved.format(0)):
        assert registry.resolve("auto", "cuda:0", "nearest") == "eager"
    assert registry.resolve("cuda", "cuda:0", "nearest") == "cuda", "an explicit request needs no verification"
    assert registry.available("cuda:0", "nearest") == ["cuda", "eager"]
    machine(HOPPER, ADA)
    path = verified.record(proof.key("cuda", HOPPER), {"gpu": HOPPER.name})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.resolve("auto", "cuda:0", "nearest") == "cuda"
    with pytest.warns(RuntimeWarning, match=unproved.format(1)):
        assert registry.resolve("auto", "cuda:1", "nearest") == "eager"
    report = dict(registry.report())
    assert report["backend cuda"].startswith("nvcc 13.0 for sm_80, sm_90a; kmeans_init, lookup, nearest,")
    assert report["cuda on GPU 0"] == f"verified, says {path}"
    triton_absent = "triton is not installed: pip install triton"
    assert report["auto on a GPU"] == (
        f"GPU 0: cuda, and eager where it has no kernel: {triton_absent}; GPU 1: eager: {triton_absent}"
    )
    assert report["cuda on GPU 1"].startswith(
        "not verified: auto does not take it; run `vqkernels verify --backend cuda`"
    )


@pytest.mark.parametrize("field", ["capability", "source", "compiler"])
def test_a_verification_of_something_else_vouches_for_nothing(field, machine):
    machine(HOPPER)
    verified.record(proof.key("cuda", HOPPER)._replace(**{field: "other"}), {})
    with pytest.warns(RuntimeWarning):
        assert registry.resolve("auto", "cuda", "statistics") == "eager"


def test_triton_goes_first_where_both_were_verified(machine, monkeypatch):
    monkeypatch.setattr(triton, "problem", lambda: None)
    monkeypatch.setattr(triton, "compiler", lambda: "3.6")
    machine(HOPPER)
    verified.record(proof.key("cuda", HOPPER), {})
    assert registry.resolve("auto", "cuda", "nearest") == "cuda"
    machine(HOPPER)
    verified.record(proof.key("triton", HOPPER), {})
    assert registry.resolve("auto", "cuda", "nearest") == "triton"


def test_a_refusal_is_one_sentence(machine, monkeypatch):
    machine()
    with pytest.raises(RuntimeError, match='backend "cuda" is unavailable: torch sees no CUDA GPU'):
        registry.resolve("cuda", "cuda")
    with pytest.raises(RuntimeError, match='backend "cuda" computes CUDA tensors, got a tensor on cpu'):
        vq.codebook_statistics(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 4, backend="cuda")
    machine(HOPPER)
    with pytest.raises(
        RuntimeError, match='backend "cuda" has no kernel for "entropy"; it has kmeans_init, lookup, nearest'
    ):
        registry.resolve("cuda", "cuda", "entropy")
    monkeypatch.setattr(cuda, "build", lambda: {"absent": "nvcc is not found: set CUDA_HOME to the CUDA toolkit"})
    machine(HOPPER)
    with pytest.raises(RuntimeError, match='backend "cuda" is unavailable: nvcc is not found'):
        registry.resolve("cuda", "cuda")
    assert (
        dict(registry.report())["backend cuda"] == "unavailable: nvcc is not found: set CUDA_HOME to the CUDA toolkit"
    )


def test_auto_takes_nothing_for_an_operator_that_the_cuda_kernels_lack(machine):
    machine(HOPPER)
    verified.record(proof.key("cuda", HOPPER), {})
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert registry.resolve("auto", "cuda", "entropy") == "eager"


@pytest.mark.parametrize(
    ("architectures", "capability", "served"),
    [
        (["sm_80"], (8, 0), True), (["sm_80"], (8, 9), True), (["sm_86"], (8, 0), False), (["sm_80"], (9, 0), False),
        (["sm_90a"], (9, 0), True), (["sm_90a"], (10, 0), False), (["sm_100"], (10, 3), True),
        (["sm_100"], (12, 0), False), (["sm_100 and its PTX"], (12, 0), True), (["sm_90 and its PTX"], (8, 0), False),
        (["sm_90a and its PTX"], (10, 0), False), ([], (8, 0), False), (["sm_80", "sm_120"], (12, 0), True),
    ],
)  # fmt: skip
def test_which_gpus_a_build_serves(architectures, capability, served, monkeypatch):
    monkeypatch.setattr(cuda, "build", lambda: {"architectures": architectures})
    assert cuda.supports(capability) == served


def test_the_built_library_needs_neither_a_driver_nor_a_cuda_torch():
    """It was loaded by this very process, whose torch may know no CUDA, and computes on the CPU."""
    if "absent" in cuda.build():
        pytest.skip(f"no CUDA kernels here: {cuda.build()['absent']}")
    assert cuda.problem() is None
    needed = subprocess.run(["ldd", str(cpu.library_path())], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed and "libtorch_cuda" not in needed, needed
    z, codebook = torch.randn(9, 3), torch.randn(5, 3)
    assert vq.nearest_code(z, codebook, backend="cpu").equal(vq.nearest_code(z, codebook, backend="eager"))
    for name in ("nearest", "lookup", "segment_sums", "row_gradient"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vqkernels::cuda_{name}", "CUDA"), name
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA kernels of segment sums could not be launched"):
            torch.ops.vqkernels.cuda_segment_sums_workspace(100, 5, 3)


def test_too_many_rows_are_refused_in_a_sentence():
    z, indices = torch.zeros(1).expand(2**31, 1, 1, 1), torch.zeros(1, dtype=torch.int64).expand(2**31, 1, 1)
    with pytest.raises(RuntimeError, match="number rows and codes in 31 bits, got 2147483648 rows and 4 codes"):
        statistics.statistics(z, indices, 4, None)


def rehearsed(*arguments):
    """(operator, claim, cases, failures) of each claim, from a process of its own."""
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    command = [sys.executable, "-W", "ignore", "-m", "native.cuda_rehearsal", *arguments]
    paths = {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | paths)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_operators_through_the_executor():
    outcomes = rehearsed("statistics", "backward", "lookup", "--every", "15")
    assert len(outcomes) == 5
    assert all(cases > 0 and not failures for _, _, cases, failures in outcomes), outcomes


OUTSIDE = """
import torch
from native import cuda_rehearsal
library = cuda_rehearsal.rehearse()
from vqkernels.ops.quantize import quantize_with_statistics
z, codes = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
indices = torch.tensor([0, 4, -1, 3, 99])
found = quantize_with_statistics(z, codes, indices=indices, backend="cuda")
(found.quantized.sum() + found.commitment_loss).backward()
assert found.quantized[[1, 4]].isnan().all() and found.commitment_loss.isnan() and z.grad[[1, 4]].isnan().all()
assert found.quantized[[0, 3]].equal(codes[[0, 3]]) and not found.quantized[2].any() and not z.grad[2].any()
assert found.counts[0].tolist() == [1, 0, 0, 1] and found.sums[0, 0].equal(z[0])
"""


def test_a_given_index_outside_the_codebook_becomes_nan():
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    paths = {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", OUTSIDE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | paths)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_every_claim_through_the_executor():
    """What `vqkernels verify --backend cuda` claims, thinned out, but for the search, which has tests of its own."""
    outcomes = rehearsed("statistics", "backward", "lookup", "quantize", "all", "--every", "8")
    assert len(outcomes) == 8
    assert all(cases > 0 and not failures for _, _, cases, failures in outcomes), outcomes


def test_the_command_notes_a_proof(machine, monkeypatch, capsys):
    machine(HOPPER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "compiler", lambda: "3.6")
    outcome = suite.Outcome("statistics", "a claim", 1, 0.0, ())
    for failures in (("a case",), ()):
        found = outcome._replace(failures=failures)
        monkeypatch.setattr(command, "verify", lambda backend, device, workers, found=found: iter([found]))
        assert command.run(["--backend", "cuda"]) == int(bool(failures))
        assert (verified.where(proof.key("cuda", HOPPER)) is None) == bool(failures)
    assert verified.where(proof.key("triton", HOPPER)) is None, "the Triton kernels were not proved"


def test_the_suite_claims_what_the_backend_has():
    told = {suite.CLAIMS[i][0] for i in suite.claims_about("cuda")}
    assert told == {"nearest", "quantize", "lookup", "sample", "statistics", "backward", "all"}
    assert len(suite.claims_about("triton")) == len(suite.CLAIMS)
