// The entropy sweeps in double: arrays of eight, which the compiler makes vectors of, and the C library's 2^x.
#include <math.h>
#include <stdint.h>

namespace vqkernels {
namespace {
namespace entropy_sweeps {

using Real = double;
constexpr int kLanes = 8, kTile = 4, kChannels = 1;
struct Vector {
  double lane[kLanes];
};
constexpr double kLowest = -1022.0, kFar = 1e300;

template <class F> inline __attribute__((always_inline)) Vector lanes(const F& f) {
  Vector x;
  for (int i = 0; i < kLanes; ++i) x.lane[i] = f(i);
  return x;
}

inline Vector load(const double* p) {
  return lanes([&](int i) { return p[i]; });
}
inline void store(double* p, const Vector& x) {
  for (int i = 0; i < kLanes; ++i) p[i] = x.lane[i];
}
inline Vector splat(double x) {
  return lanes([&](int) { return x; });
}
inline Vector add(const Vector& a, const Vector& b) {
  return lanes([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vector sub(const Vector& a, const Vector& b) {
  return lanes([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vector mul(const Vector& a, const Vector& b) {
  return lanes([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vector fma(const Vector& a, const Vector& b, const Vector& c) {
  return lanes([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline Vector max(const Vector& a, const Vector& b) {
  return lanes([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline bool any_greater(const Vector& a, const Vector& b) {
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= a.lane[i] > b.lane[i];
  return any;
}
inline Vector exponential(const Vector& x) {
  return lanes([&](int i) { return x.lane[i] < kLowest ? 0.0 : exp2(x.lane[i]); });
}

}  // namespace entropy_sweeps
}  // namespace
}  // namespace vqkernels

#include "entropy.inl"

const vqkernels::EntropyKernels<double> vqkernels::kEntropyDouble = entropy_sweeps::kEntropy;
