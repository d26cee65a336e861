// The certificate of the fp16 candidate pass: the largest score that a code may have and still be the contract's
// choice.
//
// The derivation, and the attack on it, are those of vqkernels/backends/triton/margin.py and tests/backends/triton/
// test_margin.py; this is the same function, operation by operation. In code units: X is a row's rounded image with
// |X| <= norm and |X - x| <= error, Y_j that of code j with |Y_j| <= radius and |Y_j - y_j| <= spread; `best` is the
// smallest computed score of u_j = |Y_j|^2 / 2 - X.Y_j (dot and cosine: -X.Y_j), computed within eta:
//   eta       every product and running sum of a tensor core cuts off at most 2^-23 of norm radius: 1.25 D' of them,
//             taken twice; 2^-21 covers the roundings of the half norms and of the final sum, 2^-40 what is subnormal
//   triangle  |X - Y_j| is within error + spread of |x - y_j|: good where a row is near its code
//   reach     Cauchy-Schwarz on the differences of the inner products: good where all codes are far
//   contract  the float64 sum of squares is within (D + 2) 2^-53 of the true one, on either side
// A NaN or an infinity among the inputs gives a limit that keeps every code: callers keep one unless score > limit.
#pragma once
#include <math.h>

#include "cpu/rows.h"
#include "cuda/portable.h"

namespace vqkernels {

// `padded` is D as the packed operands store it.
VQ_BOTH float margin_threshold(float best, float norm, float error, float radius, float spread, int padded,
                               Metric metric) {
  const float gamma = 2.0f * 1.25f * float(padded) * 0x1p-23f;
  const float eta = (gamma + 0x1p-21f) * norm * radius + 0x1p-21f * radius * radius + 0x1p-40f;
  const float reach = error * (radius + spread) + norm * spread;
  float slack = 2.0f * reach;
  if (metric == Metric::euclidean) {
    const float square = norm * norm + 2.0f * (best + eta);
    const float far = sqrtf(square < 0.0f ? 0.0f : square) * (1.0f + 0x1p-20f);
    const float w = error + spread;
    const float triangle = 2.0f * w * (far + w);
    const float cauchy = 2.0f * (reach + spread * (radius + 0.5f * spread));
    const float contract = float(padded + 8) * 0x1p-52f;
    // not lower(): a NaN in either must reach the limit
    slack = (triangle <= cauchy ? triangle : cauchy) + contract * (far + w) * (far + w);
    if (triangle != triangle) slack = triangle;
  }
  return best + 1.01f * (2.0f * eta + slack);
}

}  // namespace vqkernels
