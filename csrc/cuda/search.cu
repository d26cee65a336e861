// The candidate pass for every D' bucket: see search.h.
#include "matrix.cuh"
#include "search.h"

namespace vqkernels {
namespace cuda {
namespace {

template <int kSlice, bool kStreamed>
__global__ void __launch_bounds__(kSearchThreads, 2) search_kernel(const SearchArguments arguments) {
  DeviceBlock block;
  search_block<kSlice, kStreamed>(block, arguments);
}

template <int kSlice, bool kStreamed>
cudaError_t launch(const SearchArguments& arguments, int64_t row_tiles, cudaStream_t stream) {
  constexpr int kBytes = search_shared_bytes(kSlice, kStreamed);
  if (kBytes > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(search_kernel<kSlice, kStreamed>,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(unsigned(row_tiles * arguments.splits), unsigned(arguments.heads));
  search_kernel<kSlice, kStreamed><<<grid, kSearchThreads, kBytes, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_search(const SearchArguments& arguments, int64_t row_tiles, cudaStream_t stream) {
  switch (arguments.padded) {
    case 16: return launch<16, false>(arguments, row_tiles, stream);
    case 32: return launch<32, false>(arguments, row_tiles, stream);
    case 64: return launch<64, false>(arguments, row_tiles, stream);
    case 128: return launch<128, false>(arguments, row_tiles, stream);
    default: return launch<kStreamSlice, true>(arguments, row_tiles, stream);
  }
}

}  // namespace cuda
}  // namespace vqkernels
