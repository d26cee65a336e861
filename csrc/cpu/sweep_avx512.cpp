// The inner kernels for AVX-512; compiled with -march=x86-64-v4.
#if defined(__x86_64__)
static constexpr int kCodesPerTile = 12;
#include "sweep.inl"
#include "integers.inl"

const vqkernels::Sweep vqkernels::kSweepAvx512 = {Level::avx512, kRows, kCodesPerTile, prepare, sweep, sift, contract,
    transpose_words, &kIntegers};
#endif
