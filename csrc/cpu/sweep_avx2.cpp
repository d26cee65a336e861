// The inner kernels for AVX2+FMA; compiled with -march=x86-64-v3.
#if defined(__x86_64__)
static constexpr int kCodesPerTile = 6;
#include "sweep.inl"
#include "integers.inl"

const vqkernels::Sweep vqkernels::kSweepAvx2 = {Level::avx2, kRows, kCodesPerTile, prepare, sweep, sift, contract,
    transpose_words, &kIntegers};
#endif
