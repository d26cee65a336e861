#if defined(__x86_64__)
#include "pixelcnn_step.inl"

namespace vqkernels {

VQKERNELS_PIXELCNN_BODIES(avx512, float)
VQKERNELS_PIXELCNN_BODIES(avx512, double)
void exponentials_avx512(double* x, int64_t count) { exponentials(x, count); }

}  // namespace vqkernels
#endif
