// The kernels for any CPU: the compiler's own four-lane vectors.
static constexpr int kCodesPerTile = 4, kEntropyTile = 4, kEntropyChannels = 2;
#include "kernels.inl"

namespace vqkernels {

const Kernels& baseline_kernels() { return kKernels; }

}  // namespace vqkernels
