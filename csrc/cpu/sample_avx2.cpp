#if defined(__x86_64__)
#include "sample.inl"

namespace vqkernels {

void sample_panel_avx2(const SamplePanel& panel) { sample_panel(panel); }

}  // namespace vqkernels
#endif
