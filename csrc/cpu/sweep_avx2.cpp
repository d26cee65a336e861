// The inner kernels for AVX2+FMA; compiled with -march=x86-64-v3.
#if defined(__x86_64__)
static constexpr int kCodesPerTile = 6;
#include "sweep.inl"
#include "sweep16.inl"

const vqkernels::Sweep vqkernels::kSweepAvx2 = {Level::avx2, kRows, kCodesPerTile, prepare, sweep, sift, contract, quantize,
                                                sweep16};
#endif
