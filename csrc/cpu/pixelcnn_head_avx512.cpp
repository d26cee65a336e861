#if defined(__x86_64__)
#include "pixelcnn_head.inl"

namespace vqkernels {

VQKERNELS_PIXELCNN_HEAD_BODIES(avx512, float)
VQKERNELS_PIXELCNN_HEAD_BODIES(avx512, double)

}  // namespace vqkernels
#endif
