// From CUDA tensors to the raw views of csrc/cuda: no torch library of CUDA is needed, here or at run time.
//
// The operators `vqkernels::cuda_*` fill tensors that their caller (vqkernels/backends/cuda) has allocated, in
// canonical form: z (batch, head, position, channel), one number per row (batch, head, position), codebooks (head,
// code, channel). The caller also makes z's device the current one and names its stream as an integer.
#pragma once
#include <cuda_runtime_api.h>

#include "../cuda/rows.h"
#include "views.h"

namespace vqkernels {

inline cuda::Rows cuda_rows(const Tensor& z) {
  return {z.const_data_ptr(), dtype_of(z), z.size(0),   z.size(1),   z.size(2),
          z.size(3),          z.stride(0), z.stride(1), z.stride(2), z.stride(3)};
}

inline cuda::PerRow cuda_per_row(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}
inline cuda::PerRow cuda_per_row(const std::optional<Tensor>& x) { return x ? cuda_per_row(*x) : cuda::PerRow{}; }

inline cuda::Codes cuda_codes(const Tensor& x) {
  return {x.const_data_ptr(), dtype_of(x), x.stride(0), x.stride(1), x.stride(2)};
}
inline cuda::Codes cuda_codes(const std::optional<Tensor>& x) { return x ? cuda_codes(*x) : cuda::Codes{}; }

inline const void* data_or_null(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

inline cudaStream_t stream_of(int64_t number) { return reinterpret_cast<cudaStream_t>(number); }

// Raises what the launcher of `what` came back with.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) cudaGetLastError();  // or the runtime would tell it again of the next launch
  STD_TORCH_CHECK(error == cudaSuccess, "the CUDA kernels of ", what,
                  " could not be launched: ", cudaGetErrorString(error));
}

}  // namespace vqkernels
