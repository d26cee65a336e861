#if defined(__x86_64__)
#include "pixelcnn_layer.inl"

namespace vqkernels {

VQKERNELS_PIXELCNN_LAYER_BODIES(avx512, float)
VQKERNELS_PIXELCNN_LAYER_BODIES(avx512, double)

}  // namespace vqkernels
#endif
