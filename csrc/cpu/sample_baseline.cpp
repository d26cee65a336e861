#include "sample.inl"

namespace vqkernels {

void sample_panel_baseline(const SamplePanel& panel) { sample_panel(panel); }

}  // namespace vqkernels
