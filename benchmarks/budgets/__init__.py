"""Registers, shared memory and instructions of every GPU kernel, from machine code and without a GPU: see __main__."""

from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
