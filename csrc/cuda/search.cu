// The candidate pass for every D' bucket: see search.h.
#include "matrix.cuh"
#include "search.h"

namespace vqkernels {
namespace cuda {
namespace {

// Blocks that a multiprocessor should hold at once: what their registers allow without spilling.
constexpr int resident_blocks(int slice, bool streamed) {
  return streamed ? 2 : slice <= 16 ? 5 : slice <= 32 ? 4 : slice <= 64 ? 3 : 2;
}

template <int kSlice, bool kStreamed>
__global__ void __launch_bounds__(kSearchThreads, resident_blocks(kSlice, kStreamed))
    search_kernel(const SearchArguments arguments) {
  DeviceBlock block;
  search_block<kSlice, kStreamed>(block, arguments);
}

template <int kSlice, bool kStreamed>
cudaError_t launch(const SearchArguments& arguments, int64_t blocks, int64_t heads, cudaStream_t stream) {
  constexpr int kBytes = search_shared_bytes(kSlice, kStreamed);
  if (kBytes > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(search_kernel<kSlice, kStreamed>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(heads));
  search_kernel<kSlice, kStreamed><<<grid, kSearchThreads, kBytes, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_search(const SearchArguments& arguments, int64_t blocks, int64_t heads, cudaStream_t stream) {
  switch (arguments.padded) {
    case 16: return launch<16, false>(arguments, blocks, heads, stream);
    case 32: return launch<32, false>(arguments, blocks, heads, stream);
    case 64: return launch<64, false>(arguments, blocks, heads, stream);
    case 128: return launch<128, false>(arguments, blocks, heads, stream);
    default: return launch<kStreamSlice, true>(arguments, blocks, heads, stream);
  }
}

}  // namespace cuda
}  // namespace vqkernels
