// csrc/margin.h for Python, which compares it with the Triton kernels' margin.
#include "../../csrc/margin.h"

extern "C" void margin_thresholds(int count, const float* best, const float* norm, const float* error, float radius,
                                  float spread, int padded, int metric, float* out) {
  for (int i = 0; i < count; ++i)
    out[i] = vqkernels::margin_threshold(best[i], norm[i], error[i], radius, spread, padded, vqkernels::Metric(metric));
}
