#include "pixelcnn_head.inl"

namespace vqkernels {

VQKERNELS_PIXELCNN_HEAD_BODIES(baseline, float)
VQKERNELS_PIXELCNN_HEAD_BODIES(baseline, double)

}  // namespace vqkernels
