#if defined(__x86_64__)
#include "pixelcnn_head.inl"

namespace vqkernels {

VQKERNELS_PIXELCNN_HEAD_BODIES(avx2, float)
VQKERNELS_PIXELCNN_HEAD_BODIES(avx2, double)

}  // namespace vqkernels
#endif
