// 2^x for the float vectors of simd.h, and what else entropy.inl wants to know of them.
#include "simd.h"

namespace vqkernels {
namespace {
namespace entropy_sweeps {

using Real = float;
using Vector = Floats;

constexpr int kTile = kEntropyTile, kChannels = kEntropyChannels;
constexpr float kLowest = -126.0f;  // 2^kLowest is the smallest normal float; below, 2^x is 0
constexpr float kFar = 1e30f;       // beyond every logit that float is trusted with

// 2^x to within 1.5 units in the last place for x in [-126, 127], exactly 0 below. 2^f on [-1/2, 1/2] is the polynomial
// of degree 6 with the smallest relative error, 1.9e-9, by Remez' exchange.
inline __attribute__((always_inline)) Floats exponential(Floats x) {
  const Floats magic = splat(0x1.8p23f);  // adding it rounds to an integer, which is left in the low bits
  const Floats shifted = add(x, magic), f = sub(x, sub(shifted, magic));
  Floats y = splat(0x1.41d334p-13f);
  y = fma(y, f, splat(0x1.5f456ap-10f));
  y = fma(y, f, splat(0x1.3b2dbcp-7f));
  y = fma(y, f, splat(0x1.c6aed4p-5f));
  y = fma(y, f, splat(0x1.ebfbdap-3f));
  y = fma(y, f, splat(0x1.62e430p-1f));
  y = fma(y, f, splat(1.0f));
  return pick(less(x, splat(kLowest)), splat(0.0f), add_exponent(y, shifted));
}

}  // namespace entropy_sweeps
}  // namespace
}  // namespace vqkernels
