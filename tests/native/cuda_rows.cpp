// The segment sums and the gradient of z on the executor, for Python: what statistics.cu and backward.cu launch.
#include <stdio.h>

#include "../../csrc/cuda/row_gradient.h"
#include "../../csrc/cuda/segment_sums.h"
#include "cuda_executor.h"

using namespace vqkernels::cuda;

namespace {

// Runs `body`; returns its result, or -1 with the executor's sentence in `complaint`.
template <class Body> int guarded(char* complaint, int bytes, const Body& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    snprintf(complaint, size_t(bytes), "%s", error.what());
    return -1;
  }
}

}  // namespace

extern "C" {

int64_t cuda_segment_sums_workspace(int64_t total, int64_t groups, int64_t channels) {
  return fits_sums(total, groups) ? plan_sums(total, groups, channels, 0).bytes : -1;
}

int cuda_segment_sums(const SegmentSums* what, void* workspace, uint32_t seed, char* complaint, int bytes) {
  return guarded(complaint, bytes, [&] {
    executor::Launcher launcher{seed};
    const SumWorkspace plan = plan_sums(what->z.total(), what->z.heads * what->codes, what->z.channels, 0);
    return launch_segment_sums(launcher, *what, workspace, plan, 0);
  });
}

int cuda_row_gradient(const RowGradient* what, uint32_t seed, char* complaint, int bytes) {
  return guarded(complaint, bytes, [&] {
    executor::Launcher launcher{seed};
    return launch_row_gradients(launcher, *what);
  });
}
}
