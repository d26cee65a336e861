// The kernels for AVX-512 with VNNI: the search of its own, the others those of AVX-512.
#if defined(__x86_64__)
static constexpr int kCodesPerTile = 12;
#include "kernels.h"
#include "search.inl"

namespace vqkernels {

const Kernels& avx512_kernels();

const Kernels& vnni_kernels() {
  static const Kernels kernels = [] {
    Kernels those = avx512_kernels();
    those.sweep = filter::kSweep;
    return those;
  }();
  return kernels;
}

}  // namespace vqkernels
#endif
