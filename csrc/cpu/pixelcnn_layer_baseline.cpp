#include "pixelcnn_layer.inl"

namespace vqkernels {

VQKERNELS_PIXELCNN_LAYER_BODIES(baseline, float)
VQKERNELS_PIXELCNN_LAYER_BODIES(baseline, double)

}  // namespace vqkernels
