#include "rotation.h"

#include <math.h>

#include <algorithm>
#include <limits>

namespace vqkernels {
namespace {

constexpr double kOpposite = 0x1p-52;  // |u + q|^2 at or below which u and q are opposite to within rounding
constexpr int kPartials = 8;           // independent sums in a fixed order hide the latency of the add

// Sum of term(d) over the channels: channel d goes to partial sum d mod 8, and these are added pairwise.
template <class F> double sum_over(int64_t channels, const F& term) {
  double partial[kPartials] = {};
  int64_t d = 0;
  for (; d + kPartials <= channels; d += kPartials)
    for (int64_t i = 0; i < kPartials; ++i) partial[i] += term(d + i);
  for (int64_t i = 0; d + i < channels; ++i) partial[i] += term(d + i);
  return ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
         ((partial[1] + partial[5]) + (partial[3] + partial[7]));
}

// Scales x by 2^-exponent, so that its largest element lies in [1/2, 1), and returns its norm.
double scaled_norm(double* x, int64_t channels, int* exponent) {
  double largest = 0.0;
  for (int64_t d = 0; d < channels; ++d) largest = std::max(largest, fabs(x[d]));
  frexp(largest, exponent);
  *exponent = std::clamp(*exponent, -1000, 1000);  // 2^-exponent must be a number
  const double scale = ldexp(1.0, -*exponent);
  for (int64_t d = 0; d < channels; ++d) x[d] *= scale;
  return sqrt(sum_over(channels, [x](int64_t d) { return x[d] * x[d]; }));
}

}  // namespace

void rotate_gradient(double* z, double* e, double* g, int64_t channels) {
  int z_exponent, e_exponent;
  const double z_norm = scaled_norm(z, channels, &z_exponent), e_norm = scaled_norm(e, channels, &e_exponent);
  if (z_norm == 0.0 || e_norm == 0.0) return;
  for (int64_t d = 0; d < channels; ++d) z[d] /= z_norm, e[d] /= e_norm;
  const double along_q = 2.0 * sum_over(channels, [=](int64_t d) { return g[d] * e[d]; });
  double *s = z, *u = e;  // in their place
  for (int64_t d = 0; d < channels; ++d) {
    const double direction = z[d];
    s[d] = direction + e[d];
    u[d] = direction;
  }
  const double square = sum_over(channels, [=](int64_t d) { return s[d] * s[d]; });
  const double along_s =
      square <= kOpposite ? 0.0 : 2.0 * sum_over(channels, [=](int64_t d) { return g[d] * s[d]; }) / square;
  // An infinite ratio would turn a zero into NaN.
  const double ratio = std::min(ldexp(e_norm / z_norm, e_exponent - z_exponent), std::numeric_limits<double>::max());
  for (int64_t d = 0; d < channels; ++d) g[d] = ratio * (g[d] - along_s * s[d] + along_q * u[d]);
}

}  // namespace vqkernels
