"""Instruction counts under valgrind: no kernel costs more than it was recorded to, and hostile data cost little more.

`make instructions` records the table anew, where a change was meant.
"""

import json

import pytest
from native import callgrind
from native.build import build, compiler_version

TOLERANCE = 1.02
# Whole searches over the float32 filter's alone on the same data, and over Gaussian data.
HOSTILE = (
    "ties on a lattice",
    "codes in pairs one ulp apart",
    "codebook collapsed to a millionth",
    "rows far out of scale",
    "k-means with a large coordinate",
    "outlier code",
    "collapsed codebook",
    "codebook collapsed far from the rows",
)
COLLAPSED = ("collapsed codebook", "codebook collapsed to a millionth", "codebook collapsed far from the rows")
OVER_FLOAT32, OVER_GAUSSIAN = 1.10, 6.0


@pytest.fixture
def program(tmp_path):
    problem = callgrind.missing()
    if problem:
        pytest.skip(problem)
    return build("instructions", tmp_path)


def risen(recorded: dict[str, float], found: dict[str, float]) -> list[str]:
    """What costs more than it was recorded to, or is not in both."""
    told = [
        f"{name}: only {'recorded' if name in recorded else 'found'}" for name in sorted(recorded.keys() ^ found.keys())
    ]
    for name in sorted(recorded.keys() & found.keys()):
        if found[name] > TOLERANCE * recorded[name]:
            told.append(
                f"{name}: {found[name]:.4g}, recorded {recorded[name]:.4g} (+{found[name] / recorded[name] - 1:.1%})"
            )
    return told


def test_a_rise_is_told_and_a_fall_is_not():
    told = risen({"a": 1.0, "b": 1.0, "c": 1.0, "gone": 1.0}, {"a": 1.019, "b": 1.03, "c": 0.5, "new": 1.0})
    assert told == ["gone: only recorded", "new: only found", "b: 1.03, recorded 1 (+3.0%)"]


@pytest.mark.slow
def test_no_kernel_costs_more_instructions_than_recorded(program):
    table = json.loads(callgrind.TABLE.read_text())
    if table["compiler"] != compiler_version():
        pytest.skip(f"the instruction counts were recorded with {table['compiler']}, here is {compiler_version()}")
    told = risen(table["counts"], callgrind.counts(program, "kernels"))
    assert not told, "if this is meant, record it with `make instructions`:\n" + "\n".join(told)


@pytest.mark.slow
def test_hostile_data_cost_little_more_than_the_float32_filter_alone(program):
    found = callgrind.counts(program, "hostile")
    assert found["gaussian"] < found["gaussian, float32 alone"]
    over = {name: found[name] / found[f"{name}, float32 alone"] for name in HOSTILE}
    assert max(over.values()) <= OVER_FLOAT32, over
    collapsed = {name: found[name] / found["gaussian"] for name in COLLAPSED}
    assert max(collapsed.values()) <= OVER_GAUSSIAN, collapsed
