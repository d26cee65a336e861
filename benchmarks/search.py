"""nearest_code beside `torch.addmm(...).argmin(1)`, interleaved in one process: `python -m benchmarks.search`.

Correctness first: both results are compared with the contract before anything is timed. Prints medians and quartiles,
    how
many rows each gets wrong, and the fraction that the filter decided.
"""

import argparse
import statistics
import time

import torch

import vqkernels as vq
from vqkernels import reference

SHAPES = [(65536, 512, 64), (32768, 1024, 64), (16384, 8192, 32), (65536, 512, 8)]


def addmm_argmin(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The usual search: ||e||^2 / 2 - z.e for all pairs, then the smallest of each row."""
    return torch.addmm(codebook.square().sum(1) / 2, z, codebook.T, alpha=-1).argmin(1)


def milliseconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--check-rows", type=int, default=2048, help="rows compared with the contract")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    contenders = {
        "vqkernels": vq.nearest_code,
        "eager": lambda z, e: vq.nearest_code(z, e, backend="eager"),
        "addmm+argmin": addmm_argmin,
    }
    print(f"torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds, ms: median [quartiles]")
    for rows, size, dim in SHAPES:
        z, codebook = torch.randn(rows, dim), torch.randn(size, dim)
        expected = reference.nearest(z[: options.check_rows], codebook)
        wrong = {n: int((f(z, codebook)[: options.check_rows] != expected).sum()) for n, f in contenders.items()}
        if wrong["vqkernels"] or wrong["eager"]:
            raise SystemExit(f"wrong indices at {rows, size, dim}: {wrong}; nothing was timed")
        _, decided = vq.nearest_code(z, codebook, return_certificate=True)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, function in contenders.items():
                times[name].append(milliseconds(function, z, codebook))
        base = statistics.median(times["addmm+argmin"])
        print(f"N={rows} K={size} D={dim}, filter decided {float(decided):.2%} of rows")
        for name, values in times.items():
            low, middle, high = statistics.quantiles(values, n=4)
            rate = 2 * rows * size * dim / middle / 1e6
            print(
                f"  {name:13s} {middle:8.1f} [{low:.1f}, {high:.1f}]  {rate:6.0f} GFLOP/s  {base / middle:5.2f}x"
                f"  wrong {wrong[name]}/{options.check_rows}"
            )


if __name__ == "__main__":
    main()
