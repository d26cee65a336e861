// The inner kernels for any CPU.
static constexpr int kCodesPerTile = 4;
#include "sweep.inl"

const vqkernels::Sweep vqkernels::kSweepBaseline = {Level::baseline, kRows, kCodesPerTile, prepare, sweep, sift, contract,
    transpose_words, nullptr};
