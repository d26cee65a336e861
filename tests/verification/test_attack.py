"""The falsifier: silent on a correct backend, and quick to find, shrink and name a planted fault."""

import subprocess
import sys

import torch

from vqkernels import reference
from vqkernels.verification import attack as attack_room
from vqkernels.verification.attack import attack, draw


def test_a_correct_backend_survives(backend):
    *_, last = attack(0.1, [backend], seed=1)
    assert last.failure is None and last.cases > 3 and last.rows > 0


def test_draws_are_functions_of_the_seed():
    import random

    a, b = draw(random.Random(7)), draw(random.Random(7))
    assert str(a) == str(b) and a.z.equal(b.z) and a.codebook.equal(b.codebook)


def test_a_planted_fault_is_found_and_reduced(monkeypatch):
    def ties_to_the_highest(z, codebook, *, mask, metric, channel_dim, backend):
        rows = z.T if channel_dim == 0 else z
        found = len(codebook) - 1 - reference.nearest(rows, codebook.flip(0), metric=metric)
        return found if mask is None else torch.where(mask, found, -1)

    def broken(z, codebook, *, mask=None, metric="euclidean", channel_dim=1, backend="eager"):
        return ties_to_the_highest(z, codebook, mask=mask, metric=metric, channel_dim=channel_dim, backend=backend)

    monkeypatch.setattr(attack_room, "nearest_code", broken)
    *_, last = attack(1.0, ["eager"], seed=0)
    failure = last.failure
    assert failure is not None and failure.found != failure.expected
    assert len(failure.codebook) == 2 and failure.codebook.shape[1] == 1, "a tie needs two codes and one channel"
    assert "the contract says" in str(failure) and "nearest_code(z, codebook" in str(failure)


def test_the_command():
    command = [sys.executable, "-m", "vqkernels", "attack", "--minutes", "0.03", "--backend", "eager"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no wrong index found" in out.stdout
    refused = subprocess.run([*command, "--backend", "tpu"], capture_output=True, text=True)
    assert refused.returncode == 2 and "backend must be one of" in refused.stderr
