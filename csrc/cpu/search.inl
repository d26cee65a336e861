// The inner kernels of the search for one SIMD level: the float32 filter, and the integer filters where there are any.
#include "sweep.inl"
#if defined(__AVX2__)
#include "integers.inl"
#endif

namespace vqkernels {
namespace {
namespace filter {

constexpr Sweep kSweep = {kRows,     kCodesPerTile, prepare, sweep, sift, contract, transpose_words,
#if defined(__AVX2__)
                          &kIntegers};
#else
                          nullptr};
#endif

}  // namespace filter
}  // namespace
}  // namespace vqkernels
