"""`vqkernels verify`: tests the kernels on this machine against the contract. Needs torch alone.

Without options it tests the Triton kernels on every kind of visible GPU. If nothing failed, it records that in the
user's cache, and `backend="auto"` takes the kernels from then on. `--backend cuda` does the same for the CUDA C++
kernels.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import date

import torch

from vqkernels.backends import proof, registry, verified
from vqkernels.backends.table import BACKENDS
from vqkernels.verification.suite import verify

_DESCRIPTION = """
Test a backend against the contract: indices, values, statistics and gradients, on hostile inputs. If nothing fails on a
GPU, that is recorded in the user's cache, and backend='auto' takes these kernels on that kind of GPU from then on.
"""


def run(arguments: Sequence[str]) -> int:
    """Returns 0 if everything was proved, 1 if something failed, 2 if there is no device to test on."""
    parser = argparse.ArgumentParser(prog="vqkernels verify", description=_DESCRIPTION)
    parser.add_argument("--backend", default="triton", choices=tuple(BACKENDS), help="what to test (default: triton)")
    parser.add_argument("--device", help="such as cuda:1 (default: each kind of GPU; for cpu and eager the CPU)")
    options = parser.parse_args(arguments)
    try:
        devices = _devices(options.backend, options.device)
    except (RuntimeError, ValueError) as error:
        print(f"vqkernels verify: {error}", file=sys.stderr)
        return 2
    proofs = [_prove(options.backend, device) for device in devices]
    return 0 if all(proofs) else 1


def _devices(backend: str, wanted: str | None) -> list[torch.device]:
    """The devices to test on. Raises RuntimeError or ValueError, with the reason, if the backend has none."""
    noted = BACKENDS[backend].proof is not None
    kind = BACKENDS[backend].device or "cpu"
    device = torch.device(wanted or kind)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"there is no GPU to prove the {backend} backend on: torch sees no CUDA GPU")
    if device.type != "cuda" or wanted is not None or not noted:
        registry.resolve(backend, device)
        return [device if device.type != "cuda" else torch.device("cuda", device.index or 0)]
    # one GPU of each compute capability that the kernels support; if they support none, the first says why
    kinds = {one.capability: one.number for one in reversed(proof.visible()) if not proof.state(backend, one.number)[0]}
    if not kinds:
        registry.resolve(backend, torch.device("cuda", 0))
    return [torch.device("cuda", number) for number in sorted(kinds.values())]


def _prove(backend: str, device: torch.device) -> bool:
    """Run the suite on one device, print each claim, and record the proof if the kernels need one."""
    one = None if device.type != "cuda" else next(x for x in proof.visible() if x.number == device.index)
    print(f"backend {backend} on {one or device}", flush=True)
    failed, start = False, time.perf_counter()
    # the claims share no kernels, and compiling one after another would take minutes
    workers = min(8, os.cpu_count() or 1) if backend == "triton" else 1
    for outcome in verify(backend, device, workers=workers):
        verdict = f"{len(outcome.failures)} FAILED" if outcome.failures else "proved"
        cases = f"{outcome.cases} cases"
        print(
            f"  {outcome.operator:<10} {outcome.claim:<44} {cases:>10} {outcome.seconds:6.1f} s  {verdict}", flush=True
        )
        for failure in outcome.failures[:5]:
            print(f"    {failure}")
        failed = failed or bool(outcome.failures)
    seconds = time.perf_counter() - start
    if failed:
        print(f"  not proved, after {seconds:.0f} s: nothing was noted")
        return False
    if one is None or BACKENDS[backend].proof is None:
        print(f"  everything proved in {seconds:.0f} s")
        return True
    facts = {"gpu": one.name, "torch": torch.__version__, "when": date.today().isoformat()}
    try:
        path = verified.record(proof.key(backend, one), facts)
    except OSError as error:
        print(f"  everything proved in {seconds:.0f} s, but it cannot be noted: {error}")
        return False
    print(f"  everything proved in {seconds:.0f} s; noted in {path}: backend='auto' takes these kernels from now on")
    return True
