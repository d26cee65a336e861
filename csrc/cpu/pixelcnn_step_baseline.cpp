#include "pixelcnn_step.inl"

namespace vqkernels {

VQKERNELS_PIXELCNN_BODIES(baseline, float)
VQKERNELS_PIXELCNN_BODIES(baseline, double)
void exponentials_baseline(double* x, int64_t count) { exponentials(x, count); }

}  // namespace vqkernels
