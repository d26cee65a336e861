"""Every CUDA kernel compiles for every chip, spills nothing, and takes no more than the committed table allows."""

import json

import pytest

from benchmarks.budgets import cuda

TABLE = json.loads(cuda.TABLE.read_text())
CHIPS = [pytest.param(chip, marks=() if chip == "sm_90a" else pytest.mark.slow) for chip in cuda.CHIPS]
REGISTERS = 65536  # of a multiprocessor
# threads, and blocks of which a multiprocessor must hold so many
BLOCKS = {
    "SumChunks": (128, 4), "WriteKeys": (256, 4), "WriteBorders": (256, 4), "WriteTotals": (512, 2),
    "WriteRowGradients": (128, 8), "LookUp": (128, 4),
}  # fmt: skip


@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_stay_within_the_table(chip):
    if cuda.nvcc() is None:
        pytest.skip("nvcc is not found")
    if cuda.release() != TABLE["nvcc"]:
        pytest.skip(f"the table is of nvcc {TABLE['nvcc']}, here is {cuda.release()}")
    found = cuda.table((chip,))[chip]
    assert set(found) == set(TABLE[chip])
    for name, numbers in found.items():
        assert all(value <= TABLE[chip][name][key] for key, value in numbers.items()), (name, numbers)


@pytest.mark.parametrize("chip", cuda.CHIPS)
def test_the_table_spills_nothing_and_fills_the_multiprocessor(chip):
    for name, numbers in TABLE[chip].items():
        assert numbers["spilled"] == numbers["stack"] == 0, name
        kind = name.partition("<")[0]
        if kind in BLOCKS:
            threads, blocks = BLOCKS[kind]
            assert threads * blocks * -(-numbers["registers"] // 8) * 8 <= REGISTERS, name
    assert {name.partition("<")[0] for name in TABLE[chip]} >= set(BLOCKS)


def test_a_spill_is_read():
    told = """
ptxas info    : Compiling entry function '_ZN9vqkernels4cuda14program_kernelINS0_12WriteBordersEEEvT_' for 'sm_80'
ptxas info    : Function properties for _ZN9vqkernels4cuda14program_kernelINS0_12WriteBordersEEEvT_
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem
"""
    numbers = {"registers": 40, "spilled": 12, "stack": 16, "shared": 512}
    assert cuda.readable(cuda.parse(told)) == {"WriteBorders": numbers}
