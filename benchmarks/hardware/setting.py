"""Where the command runs: a GPU, or its rehearsal on the CPU in Triton's interpreter, with tiny sizes and no times."""

import datetime
import os
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from vqkernels.backends import proof, registry, table
from vqkernels.backends import triton as kernels
from vqkernels.bench import gpu as bench_gpu
from vqkernels.bench import machine

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


@dataclass
class Setting:
    """What every stage is given."""

    device: torch.device
    dry: bool
    deadline: float  # of time.monotonic()
    wheels: Path | None = None  # a folder of wheels of peers
    kept: list[Any] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def size(self, full: T, tiny: T) -> T:
        """A size for the GPU, or the rehearsal's."""
        return tiny if self.dry else full

    def times(self, contenders: dict[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
        """Of everyone in turn, as in `bench.gpu`; none is kept in a rehearsal."""
        return bench_gpu.times(contenders, self.device, self.dry)

    def replayed(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function as a CUDA graph; as it is in a rehearsal."""
        return bench_gpu.replayed(function, self.device)


def on_gpu(minutes: float, wheels: Path | None) -> Setting:
    """The GPU of this process; raises one sentence where the kernels cannot serve it."""
    registry.resolve("triton", "cuda")
    return Setting(torch.device("cuda", torch.cuda.current_device()), False, time.monotonic() + 60 * minutes, wheels)


def rehearsal(minutes: float, wheels: Path | None) -> Setting:
    """The CPU, with the Triton kernels in the place of the package's own."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the dry run interprets the kernels: set TRITON_INTERPRET=1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch notes that the operators had kernels for the CPU
        library = table.register("triton", "vqkernels", "CPU")
    registry.resolve = lambda backend, device, operator=None: "eager" if backend == "eager" else "triton"  # type: ignore
    torch.set_num_threads(1)
    return Setting(torch.device("cpu"), True, time.monotonic() + 60 * minutes, wheels, [library])


def facts(setting: Setting) -> dict[str, Any]:
    """What a reader needs to judge a figure."""
    found: dict[str, Any] = machine.facts(torch.get_num_threads())
    found |= {
        "dry run": setting.dry,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "changed files": _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"),
        "kernels": kernels.source_hash(),
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory GB": round(properties.total_memory / 1e9, 1),
            "driver, clocks": _output(
                "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.sm,power.limit", "--format=csv,noheader"
            ),
            "verification key": proof.key(
                "triton", proof.Gpu(0, properties.name, (properties.major, properties.minor))
            )._asdict(),
        }
    return found


def _output(*command: str) -> str | None:
    """What a program prints, or None where it is absent or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
