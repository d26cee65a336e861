"""The certificate: which candidates can still be the nearest code, given the scores of the candidate pass.

Notation, in code units (pack.py, rows.py): x = 2^c (z - centre) and y_j = 2^c (e_j - centre) are real vectors,
X = beta·q and Y_j their rounded images, ‖X - x‖ <= error, ‖Y_j - y_j‖ <= spread, ‖X‖ <= norm, ‖Y_j‖ <= radius. The
exact score of the images is u_j = ½‖Y_j‖² - X·Y_j (the dot product and cosine: -X·Y_j); a kernel computes v_j with
|v_j - u_j| <= eta.

eta, the accumulation model. Products of fp16 numbers are exact in fp32. A tensor core aligns the products of one step
and the running sum to their largest exponent and cuts each of them off: every one of the D' products and of the at most
D'/4 running sums loses at most 2^-23 of the largest magnitude present, which is at most Σ|X_d Y_jd| <= norm·radius.
That is 1.25·D'·2^-23·norm·radius; we take twice that, GAMMA. Ordinary fp32 sums in any order (the interpreter, the
re-check of a group) lose less. The scaled subtraction, the rounding of ½‖Y_j‖² and the final fp32 sum of the threshold
each lose at most 2^-24 of norm·radius + ½radius²; 2^-21 covers them together.

Threshold. Let `best` be the smallest v_j, at code b. If the contract (float64, sequential) prefers j or ties, then
S_j <= S_b (1 + 2.1·(D+2)·2^-53) for the exact squared distances S, since a sum of squares in float64 is within a
relative (D+2)·2^-53. Write far = ‖X - Y_b‖ <= sqrt(norm² + 2(best + eta)), w = error + spread, so sqrt(S_b) <= far + w.
  (triangle)  |sqrt(S_j) - ‖X - Y_j‖| <= w for every j, so ‖X - Y_j‖ <= far + 2w, so u_j <= u_b + 2w·far + 2w².
  (Cauchy-Schwarz)  |½‖y_j‖² - x·y_j - u_j| <= a := spread·(radius + ½spread) + error·(radius + spread) + norm·spread,
                    so u_j <= u_b + 2a.
Both hold; the smaller is taken. The first is better when a row is near its code, the second when all codes are far.
With v_j <= u_j + eta and u_b <= best + eta, every code that the contract could choose has
    v_j <= best + 2·eta + min(2w(far + w), 2a) + (D+8)·2^-52·(far + w)².
A code that was left out of the pack (pack.py) has no image; its v_j is below ½‖y_j‖² - X·y_j and ½‖y_j‖² - x·y_j. It
is never at `best`. If the contract prefers it, ‖x - y_j‖ <= far + w up to the term (D+8)·2^-52, so
‖X - y_j‖ <= far + 2w and ½‖y_j‖² - X·y_j <= u_b + 2w·far + 2w², and also
½‖y_j‖² - x·y_j <= ½‖y_b‖² - x·y_b <= u_b + a: the same threshold holds.
The products are widened by 1 % against their own rounding. For the dot product and cosine the first form does not
apply, a := error·(radius + spread) + norm·spread, and the float64 sum, which is within (D+4)·2^-53·‖x‖‖y‖, is inside
eta and a.
An infinity or NaN among the inputs gives an infinite or NaN threshold; callers keep a code unless `score > threshold`.
"""

import triton
import triton.language as tl


@triton.jit
def threshold(best, norm, error, radius, spread, PADDED: tl.constexpr, METRIC: tl.constexpr):
    """Upper bound of the computed score of every code that the contract could choose. Works elementwise on rows."""
    gamma: tl.constexpr = 2.0 * 1.25 * PADDED * 2.0**-23
    eta = (gamma + 2.0**-21) * norm * radius + 2.0**-21 * radius * radius + 2.0**-40
    reach = error * (radius + spread) + norm * spread
    if METRIC == "euclidean":
        far = tl.sqrt(tl.maximum(norm * norm + 2.0 * (best + eta), 0.0)) * (1.0 + 2.0**-20)
        w = error + spread
        triangle = 2.0 * w * (far + w)
        cauchy = 2.0 * (reach + spread * (radius + 0.5 * spread))
        contract: tl.constexpr = (PADDED + 8) * 2.0**-52
        slack = tl.minimum(triangle, cauchy) + contract * (far + w) * (far + w)
    else:
        slack = 2.0 * reach
    return best + 1.01 * (2.0 * eta + slack)
