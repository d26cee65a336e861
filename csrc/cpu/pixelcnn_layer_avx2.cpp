#if defined(__x86_64__)
#include "pixelcnn_layer.inl"

namespace vqkernels {

VQKERNELS_PIXELCNN_LAYER_BODIES(avx2, float)
VQKERNELS_PIXELCNN_LAYER_BODIES(avx2, double)

}  // namespace vqkernels
#endif
