// The kernels for AVX2 and FMA.
#if defined(__x86_64__)
static constexpr int kCodesPerTile = 6, kEntropyTile = 6, kEntropyChannels = 2;
#include "kernels.inl"

namespace vqkernels {

const Kernels& avx2_kernels() { return kKernels; }

}  // namespace vqkernels
#endif
