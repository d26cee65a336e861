"""Named inputs on which a nearly right search gives wrong indices. Each yields z (N, D) and codebook (K, D)."""

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def gaussian(n: int, k: int, d: int) -> Pair:
    return torch.randn(n, d), torch.randn(k, d)


def clustered(n: int, k: int, d: int) -> Pair:
    codes = torch.randn(k, d)
    return codes[torch.randint(k, (n,))] + 0.1 * torch.randn(n, d), codes


def equal_to_codes(n: int, k: int, d: int) -> Pair:
    codes = torch.randn(k, d)
    return codes[torch.randint(k, (n,))].clone(), codes


def duplicated_codes(n: int, k: int, d: int) -> Pair:
    return torch.randn(n, d), torch.randn(max(1, k // 5), d)[torch.randint(max(1, k // 5), (k,))]


def collapsed(n: int, k: int, d: int) -> Pair:
    return torch.randn(n, d), torch.randn(1, d).repeat(k, 1)


def one_ulp_apart(n: int, k: int, d: int) -> Pair:
    codes = torch.randn(1, d).repeat(k, 1)
    for _ in range(3):
        move = torch.rand(k, d) < 0.3
        codes = torch.where(move, torch.nextafter(codes, torch.full_like(codes, torch.inf)), codes)
    return codes[torch.randint(k, (n,))] + 1e-7 * torch.randn(n, d), codes


def half_integer_lattice(n: int, k: int, d: int) -> Pair:
    return torch.randint(-3, 4, (n, d)) / 2.0, torch.randint(-2, 3, (k, d)).float()


def offset(amount: float) -> Callable[[int, int, int], Pair]:
    return lambda n, k, d: (torch.randn(n, d) + amount, torch.randn(k, d) + amount)


def offset_of_z_alone(n: int, k: int, d: int) -> Pair:
    return torch.randn(n, d) + 1e4, torch.randn(k, d)


def scaled(amount: float) -> Callable[[int, int, int], Pair]:
    return lambda n, k, d: (torch.randn(n, d) * amount, torch.randn(k, d) * amount)


def scaled_apart(n: int, k: int, d: int) -> Pair:
    return torch.randn(n, d), torch.randn(k, d) * 1e-4


def codes_far_larger(n: int, k: int, d: int) -> Pair:
    return torch.randn(n, d) * 1e-4, torch.randn(k, d)


def huge_coordinate_in_z(n: int, k: int, d: int) -> Pair:
    z, codes = gaussian(n, k, d)
    z[::3, 0] = 1e18
    return z, codes


def huge_coordinate_in_a_code(n: int, k: int, d: int) -> Pair:
    z, codes = gaussian(n, k, d)
    codes[k // 2, -1] = 3e15
    return z, codes


def norms_over_eight_decades(n: int, k: int, d: int) -> Pair:
    codes = torch.randn(k, d) * torch.logspace(-4, 4, k)[torch.randperm(k), None]
    return codes[torch.randint(k, (n,))] * (1 + 0.1 * torch.randn(n, d)), codes


def subnormal(n: int, k: int, d: int) -> Pair:
    return torch.randn(n, d) * 1e-40, torch.randn(k, d) * 1e-40


def near_the_largest_float(n: int, k: int, d: int) -> Pair:
    return torch.randn(n, d).clamp(-3, 3) * 1e38, torch.randn(k, d).clamp(-3, 3) * 1e38


def zero_codes(n: int, k: int, d: int) -> Pair:
    z, codes = gaussian(n, k, d)
    codes[::2] = 0.0
    codes[k - 1] = -0.0
    return z, codes


def non_finite_codes(n: int, k: int, d: int) -> Pair:
    z, codes = gaussian(n, k, d)
    codes[0, 0], codes[k // 2, -1] = torch.nan, torch.inf
    if k > 2:
        codes[-1] = -torch.inf
    return z, codes


def non_finite_rows(n: int, k: int, d: int) -> Pair:
    z, codes = gaussian(n, k, d)
    z[::4, -1], z[1::4, 0] = torch.nan, -torch.inf
    return z, codes


def absorbed(n: int, k: int, d: int) -> Pair:
    """Rounding errors that all have the same sign and are nearly as large as the bound allows.

    Each product a_d b_d is just under half an ulp of the running sum, so every multiply-add rounds it away. The float32
    score of the first code is too high by nearly D u h, that of the second too low by as much, and their order is the
    reverse of the true one. A third code, far away, makes the mean zero. There are always three codes, for every k.
    """
    rest, unit = max(d - 1, 1), 2.0**-24
    z = torch.full((n, d), 0.1 / rest**0.5, dtype=torch.float64)
    z[:, 0] = 0.0
    step = 0.98 * unit * rest**0.5 / 0.1
    half_square = torch.tensor([1.01 + 1.9 * rest * unit, 1.01], dtype=torch.float64)
    codes = torch.zeros(3, d, dtype=torch.float64)
    codes[0, 1:], codes[1, 1:] = step, -step
    codes[:2, 0] = (2 * half_square - codes[:2, 1:].square().sum(1)).sqrt()
    codes[2] = -codes.sum(0)
    return z.float(), codes.float()


ADVERSARIES: dict[str, Callable[[int, int, int], Pair]] = {
    "gaussian": gaussian,
    "clustered": clustered,
    "equal to codes": equal_to_codes,
    "duplicated codes": duplicated_codes,
    "collapsed": collapsed,
    "one ulp apart": one_ulp_apart,
    "half-integer lattice": half_integer_lattice,
    "offset 1e2": offset(1e2),
    "offset 1e4": offset(1e4),
    "offset 1e6": offset(1e6),
    "offset of z alone": offset_of_z_alone,
    "scale 1e-30": scaled(1e-30),
    "scale 1e-10": scaled(1e-10),
    "scale 1e15": scaled(1e15),
    "codes 1e-4 of z": scaled_apart,
    "z 1e-4 of codes": codes_far_larger,
    "huge coordinate in z": huge_coordinate_in_z,
    "huge coordinate in a code": huge_coordinate_in_a_code,
    "norms over eight decades": norms_over_eight_decades,
    "roundings that all fall one way": absorbed,
    "subnormal": subnormal,
    "near the largest float": near_the_largest_float,
    "zero codes": zero_codes,
    "non-finite codes": non_finite_codes,
    "non-finite rows": non_finite_rows,
}
