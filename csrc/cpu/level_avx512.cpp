// The kernels for AVX-512: its F, BW, DQ and VL.
#if defined(__x86_64__)
static constexpr int kCodesPerTile = 12, kEntropyTile = 8, kEntropyChannels = 4;
#include "kernels.inl"

namespace vqkernels {

const Kernels& avx512_kernels() { return kKernels; }

}  // namespace vqkernels
#endif
