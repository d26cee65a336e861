// The entropy sweeps for AVX2+FMA; compiled with -march=x86-64-v3.
#if defined(__x86_64__)
#include "exponential.inl"
static constexpr int kTile = 6, kChannels = 2;
#include "entropy.inl"

const vqkernels::EntropyKernels<float> vqkernels::kEntropyAvx2 = kKernels;
#endif
