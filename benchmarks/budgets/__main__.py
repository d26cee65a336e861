"""Registers, shared memory and instructions of every GPU kernel, from machine code and without a GPU.

    python -m benchmarks.budgets [triton] [cuda] [cuda-search]     print the tables
    python -m benchmarks.budgets [...] --write                     also write them to benchmarks/results

`triton` needs Triton, the others nvcc. Tests compare the written tables. Nothing in them is a time measured on a GPU.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.budgets import RESULTS


def _triton() -> dict[str, Any]:
    from benchmarks.budgets import entropy, search
    from benchmarks.budgets.launches import CHIPS

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("the interpreter compiles nothing: unset TRITON_INTERPRET")
    return search.table(list(CHIPS)) | {"entropy": entropy.table(list(CHIPS))}


def _cuda() -> dict[str, Any]:
    from benchmarks.budgets import cuda

    return cuda.table()


def _cuda_search() -> dict[str, Any]:
    from benchmarks.budgets import cuda_search

    return cuda_search.table()


# Of each family of kernels: its file in benchmarks/results, and what counts it.
FAMILIES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "triton": ("instruction_budget.json", _triton),
    "cuda": ("cuda_budget.json", _cuda),
    "cuda-search": ("cuda_search_budget.json", _cuda_search),
}


def lines(table: dict[str, Any], *names: str) -> Iterator[str]:
    """One line for every kernel of a table."""
    for name, entry in table.items():
        if isinstance(entry, dict) and any(isinstance(x, dict) for x in entry.values()):
            yield from lines(entry, *names, name)
        elif isinstance(entry, dict):
            yield f"{' '.join((*names, name)):60s} " + "  ".join(f"{key} {value}" for key, value in entry.items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all when left out")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/results")
    options = parser.parse_args(arguments)
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"FAMILY must be one of {', '.join(FAMILIES)}, got {', '.join(sorted(unknown))}")
    for name in options.families or FAMILIES:
        file, count = FAMILIES[name]
        try:
            table = count()
        except RuntimeError as error:
            parser.error(str(error))
        print("\n".join(lines(table)), flush=True)
        if options.write:
            (RESULTS / file).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
