// The entropy sweeps for AVX-512; compiled with -march=x86-64-v4.
#if defined(__x86_64__)
#include "exponential.inl"
static constexpr int kTile = 8, kChannels = 4;
#include "entropy.inl"

const vqkernels::EntropyKernels<float> vqkernels::kEntropyAvx512 = kKernels;
#endif
