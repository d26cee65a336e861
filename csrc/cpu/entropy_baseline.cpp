// The entropy sweeps for any CPU: the compiler's own four-lane vectors.
#include "exponential.inl"
static constexpr int kTile = 4, kChannels = 2;
#include "entropy.inl"

const vqkernels::EntropyKernels<float> vqkernels::kEntropyBaseline = kKernels;
