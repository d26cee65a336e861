// Plain-C facts about this build, read through ctypes: no Python and no tensor.
#include "../cpu/level.h"

extern "C" __attribute__((visibility("default"))) const char* vqkernels_simd_levels() {
  using vqkernels::Level;
  return vqkernels::has_level(Level::vnni)     ? "baseline avx2 avx512 vnni"
         : vqkernels::has_level(Level::avx512) ? "baseline avx2 avx512"
         : vqkernels::has_level(Level::avx2)   ? "baseline avx2"
                                               : "baseline";
}
