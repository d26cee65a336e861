"""The contract suite: silent on a correct backend, and loud on each planted fault. And its command."""

import subprocess
import sys

import pytest
import torch

from vqkernels.backends import proof, triton, verified
from vqkernels.cli import verify as command
from vqkernels.ops import entropy, nearest, quantization, quantize, residual, sample, statistics
from vqkernels.verification.suite import CLAIMS, poisoned_memory, verify

CPU = torch.device("cpu")


def test_a_correct_backend_is_proved(backend):
    outcomes = list(verify(backend, CPU))
    assert [outcome.failures for outcome in outcomes] == [()] * len(CLAIMS)
    assert sum(outcome.cases for outcome in outcomes) > 500


def test_workers_find_the_same():
    alone, shared = (list(verify("eager", CPU, every=20, workers=workers)) for workers in (1, 2))
    assert [x._replace(seconds=0) for x in alone] == [x._replace(seconds=0) for x in shared]


def broken(operation, change):
    """The operation with its eager results changed."""
    return lambda backend, *arguments: change(list(operation.overloads["eager"](*arguments)), *arguments)


def highest_tie(results, z, codebook, *_):
    duplicate = (codebook.flatten(0, -2) == codebook.flatten(0, -2)[0]).all(-1).nonzero()[-1]
    results[0] = torch.where(results[0] == 0, duplicate, results[0])
    return results


def swapped_level(results, *_):
    results[1] = results[1].flip(-1)
    return results


def unwritten_row(results, *_):
    results[0] = results[0].clone()
    results[0].view(-1)[-1:] = torch.empty(1)
    return results


def lost_row(results, *_):
    counts = results[0].clone()
    counts.view(-1)[counts.view(-1).argmax()] -= 1
    return [counts, *results[1:]]


def unrotated(results, *arguments):
    return quantization.quantize_backward.overloads["eager"](*arguments[:7], "straight_through", arguments[8])


def next_code(results, z, codebook, indices, *arguments):
    return quantize.lookup.overloads["eager"](z, codebook, (indices + 1).clamp_max(codebook.shape[-2] - 1), *arguments)


def unshifted_rows(results, *arguments):
    return sample.sample.overloads["eager"](*arguments[:7], 0)


def lowered_entropy(results, *_):
    return [results[0] * 0.99, *results[1:]]


def halved_gradient(results, *_):
    return [results[0], results[1] / 2]


@pytest.mark.parametrize(
    ("module", "name", "change", "claim"),
    [
        (nearest, "nearest", highest_tie, "index equals the contract's, common sizes"),
        (quantize, "quantize", unwritten_row, "looked-up values and losses"),
        (residual, "residual_quantize", swapped_level, "indices of every level, sums and statistics"),
        (entropy, "entropy", lowered_entropy, "both entropies, masked rows unread"),
        (entropy, "entropy_backward", halved_gradient, "gradients of the entropies equal the reference's"),
        (quantize, "lookup", next_code, "given indices give the bits of the search"),
        (sample, "sample", unshifted_rows, "draws follow their scores and the noise"),
        (statistics, "statistics", lost_row, "counts exact, sums to rounding"),
        (quantization, "quantize_backward", halved_gradient, "gradients equal the reference's"),
        (quantization, "quantize_backward", unrotated, "rotated gradients equal the reference's"),
    ],
)
def test_a_planted_fault_breaks_its_claim(module, name, change, claim, monkeypatch):
    monkeypatch.setattr(module, name, broken(getattr(module, name), change))
    outcomes = {outcome.claim: outcome for outcome in verify("eager", CPU, every=3)}
    assert outcomes[claim].failures


def test_an_error_is_a_failure_with_its_first_line(monkeypatch):
    def fails(*_):
        raise RuntimeError("no such kernel\nand a long trace")

    monkeypatch.setattr(statistics, "statistics", fails)
    failures = [failure for outcome in verify("eager", CPU, every=9) for failure in outcome.failures]
    assert failures and all(failure.endswith("RuntimeError: no such kernel") for failure in failures)


def test_poison_is_undone():
    torch.use_deterministic_algorithms(False)
    try:
        with poisoned_memory():
            assert torch.empty(3).isnan().all()
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(True)


def test_the_command_proves_a_cpu_backend_and_notes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert command.run(["--backend", "eager"]) == 0
    assert "everything proved in" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_command_notes_a_proof_and_only_a_proof(tmp_path, monkeypatch, capsys):
    """A machine with a GPU, acted: the suite runs on the CPU, and the rest of the command is the real one."""
    one = proof.Gpu(0, "NVIDIA H200", (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(proof, "visible", lambda: [one])
    monkeypatch.setattr(triton, "compiler", lambda: "3.6")
    monkeypatch.setattr(proof, "_states", {("triton", 0): ("", "")})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "verify", lambda backend, device, workers: verify("eager", CPU, every=50))
    with monkeypatch.context() as fault:
        fault.setattr(statistics, "statistics", broken(statistics.statistics, lost_row))
        assert command.run([]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert verified.where(proof.key("triton", one)) is None
    assert command.run([]) == 0
    assert "backend='auto' takes these kernels from now on" in capsys.readouterr().out
    assert verified.where(proof.key("triton", one)) == str(verified.user_path())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["verify", "attack"])
def test_without_a_gpu_the_commands_say_so(name):
    arguments = {"verify": [], "attack": ["--device", "cuda"]}[name]
    done = subprocess.run([sys.executable, "-m", "vqkernels", name, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "torch sees no CUDA GPU" in done.stderr
    refused = subprocess.run(
        [sys.executable, "-m", "vqkernels", name, "--backend", "triton", "--device", "cpu"],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and 'backend "triton" computes CUDA tensors' in refused.stderr
