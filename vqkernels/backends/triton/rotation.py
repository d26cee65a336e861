"""The sums of a row behind the rotation trick's gradient (Fifty et al. 2024); specified by `reference.rotate`.

With u = z/|z|, q = e/|e|, s = u + q the gradient is |e|/|z| (g - 2 (g.s)/|s|² s + 2 (g.q) u): three walks over rows
that lie in cache give the numbers that the last one needs. Float64 whatever the inputs are, since u + q cancels where z
and e are nearly opposite; rows are scaled by powers of two, so that no norm overflows or vanishes.
"""

import triton
import triton.language as tl

from vqkernels.backends.triton.rows import binary_exponent, power_of_two, working


@triton.jit
def rotation_sums(
    z, codebook, gradient, live, stride_d, code_stride_d, grad_stride_d,
    DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """(to_u, to_q, ratio, along_s, along_q, directed), each [BM]: u = to_u z, q = to_q e; not directed: z or e is 0.

    z, codebook and gradient point at the rows, [BM, 1].
    """
    z_largest = tl.zeros((BM,), tl.float64)
    e_largest = tl.zeros((BM,), tl.float64)
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        read = live[:, None] & (d < DIM)[None, :]
        x = working(tl.load(z + d[None, :] * stride_d, mask=read, other=0.0), True)  # [BM, BD]
        e = working(tl.load(codebook + d[None, :] * code_stride_d, mask=read, other=0.0), True)
        z_largest = tl.maximum(z_largest, tl.max(tl.abs(x), axis=1))
        e_largest = tl.maximum(e_largest, tl.max(tl.abs(e), axis=1))
    z_exponent = tl.minimum(tl.maximum(binary_exponent(z_largest, True), -1000), 1000)
    e_exponent = tl.minimum(tl.maximum(binary_exponent(e_largest, True), -1000), 1000)
    z_scale = power_of_two(-z_exponent, True)
    e_scale = power_of_two(-e_exponent, True)

    z_square = tl.zeros((BM,), tl.float64)
    e_square = tl.zeros((BM,), tl.float64)
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        read = live[:, None] & (d < DIM)[None, :]
        x = working(tl.load(z + d[None, :] * stride_d, mask=read, other=0.0), True) * z_scale[:, None]
        e = working(tl.load(codebook + d[None, :] * code_stride_d, mask=read, other=0.0), True) * e_scale[:, None]
        z_square += tl.sum(x * x, axis=1)
        e_square += tl.sum(e * e, axis=1)
    directed = (z_square > 0.0) & (e_square > 0.0)
    z_norm = tl.sqrt(tl.where(directed, z_square, 1.0))
    e_norm = tl.sqrt(tl.where(directed, e_square, 1.0))
    to_u = z_scale / z_norm
    to_q = e_scale / e_norm

    square = tl.zeros((BM,), tl.float64)
    along_s = tl.zeros((BM,), tl.float64)
    along_q = tl.zeros((BM,), tl.float64)
    for start in range(0, DIM, BD):
        d = start + tl.arange(0, BD)
        read = live[:, None] & (d < DIM)[None, :]
        q = working(tl.load(codebook + d[None, :] * code_stride_d, mask=read, other=0.0), True) * to_q[:, None]
        s = working(tl.load(z + d[None, :] * stride_d, mask=read, other=0.0), True) * to_u[:, None] + q
        g = working(tl.load(gradient + d[None, :] * grad_stride_d, mask=read, other=0.0), True)
        square += tl.sum(s * s, axis=1)
        along_s += tl.sum(g * s, axis=1)
        along_q += tl.sum(g * q, axis=1)
    opposite: tl.constexpr = 2.0**-52
    along_s = tl.where(square > opposite, 2.0 * along_s / tl.maximum(square, opposite), 0.0)

    # in two factors, each a normal number; an infinite ratio would turn a zero into NaN
    exponent = e_exponent - z_exponent
    half = exponent >> 1
    ratio = e_norm / z_norm * power_of_two(half, True) * power_of_two(exponent - half, True)
    return to_u, to_q, tl.minimum(ratio, 1.7976931348623157e308), along_s, 2.0 * along_q, directed
