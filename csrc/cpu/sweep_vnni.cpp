// The inner kernels for AVX-512 with VNNI; compiled with -march=x86-64-v4 -mavx512vnni.
#if defined(__x86_64__)
static constexpr int kCodesPerTile = 12;
#include "sweep.inl"
#include "integers.inl"

const vqkernels::Sweep vqkernels::kSweepVnni = {Level::vnni, kRows, kCodesPerTile, prepare, sweep, sift, contract,
    transpose_words, &kIntegers};
#endif
