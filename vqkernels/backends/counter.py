"""Random numbers that are functions of what they belong to: a seed, a stream (round, head), a row, a code.

No state and no order of calls: any device, thread count or batch split draws the same bits. The twin of
csrc/cpu/counter.h. The generator is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators"): `row_keys` gives output number `row` of the generator that (seed, stream) starts. torch's int64 wraps
around as unsigned arithmetic does; a right shift is masked to shift in zeros.
"""

import torch
from torch import Tensor


def _signed(x: int) -> int:
    x %= 1 << 64
    return x - (1 << 64) if x >= 1 << 63 else x


_STEP = _signed(0x9E3779B97F4A7C15)
_LOW = (1 << 32) - 1
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def row_keys(seed: Tensor, stream: int, rows: Tensor) -> Tensor:
    """64 random bits for each row number, as int64. `seed` is a 0-d int64 tensor on the device of `rows`."""
    start = _mix(_mix(seed + _STEP) + _signed((stream + 1) * _STEP))
    return _mix(start + (rows + 1) * _STEP)


def uniform(keys: Tensor) -> Tensor:
    """The upper 53 bits of each key as a float64 in (0, 1)."""
    return (_shift(keys, 11).to(torch.float64) + 0.5) * 2.0**-53


def code_bits(keys: Tensor, codes: Tensor) -> Tensor:
    """32 random bits for each (row, code), as int64: `keys` and `codes` are int64 and broadcast together.

    Two rounds of MurmurHash3's 32-bit finaliser (Appleby 2011), with half of the key added before each: for one key a
    permutation, so different codes never draw equal bits.
    """
    bits = _mix_32((codes + keys) & _LOW)
    return _mix_32((bits + _shift(keys, 32)) & _LOW)


def _mix_32(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)


def gumbel(bits: Tensor) -> Tensor:
    """Independent standard Gumbel numbers in float64: -log(-log(1 - v)) for v = (bits + 1/2) 2^-32."""
    return -(-torch.log1p((bits.to(torch.float64) + 0.5) * -(2.0**-32))).log()
