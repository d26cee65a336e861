// Facts about this build and this CPU as plain C functions, read through ctypes: no Python and no tensor.
#include <string>

#include "../cpu/kernels.h"
#include "exported.h"
#include "peak.h"

// The SIMD levels of this CPU, lowest first, by spaces.
EXPORTED const char* vqkernels_simd_levels() {
  static const std::string names = [] {
    std::string found;
    for (const vqkernels::Level& level : vqkernels::levels())
      found += (found.empty() ? "" : " ") + std::string(level.name);
    return found;
  }();
  return names.c_str();
}

// The float32 multiply-add peak of the calling thread in operations per second, measured for about `seconds`.
EXPORTED double vqkernels_fma_rate(double seconds) { return vqkernels::fma_rate(seconds); }
