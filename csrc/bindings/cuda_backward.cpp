// vqkernels::cuda_row_gradient: the gradient of z, straight through or rotated, on the GPU.
#include "../cuda/backward.h"

#include "cuda_views.h"

namespace vqkernels {

// Fills `out`, of the sizes and dtype of z and of `incoming`, the gradient of the quantized rows; all in canonical
// form.
void cuda_row_gradient(const Tensor& z, const Tensor& codebook, const Tensor& indices, const Tensor& incoming,
                       const Tensor& grad, const Tensor& elements, bool rotate, Tensor out, int64_t stream) {
  STD_TORCH_CHECK(z.dim() == 4 && codebook.dim() == 3 && indices.dim() == 3 && incoming.dim() == 4 && out.dim() == 4,
                  "z, codebook, indices and gradients must be in canonical form");
  STD_TORCH_CHECK(
      codebook.size(0) == z.size(1) && codebook.size(2) == z.size(3) && indices.numel() * z.size(3) == z.numel(),
      "z, codebook and indices differ in heads, rows or channels");
  STD_TORCH_CHECK(incoming.scalar_type() == z.scalar_type() && out.scalar_type() == z.scalar_type() &&
                      incoming.numel() == z.numel() && out.numel() == z.numel(),
                  "gradients must be of z's sizes and dtype");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && elements.scalar_type() == ScalarType::Long,
                  "indices and elements must be int64");
  const cuda::RowGradient what = {cuda_rows(z),
                                  cuda_codes(codebook),
                                  cuda_per_row(indices),
                                  codebook.size(1),
                                  cuda_rows(incoming),
                                  cuda_rows(out),
                                  grad.const_data_ptr(),
                                  dtype_of(grad),
                                  static_cast<const int64_t*>(elements.const_data_ptr()),
                                  rotate,
                                  1};
  check_cuda(vqkernels_cuda_row_gradient(&what, stream_of(stream)), "the row gradient");
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) { m.impl("cuda_row_gradient", TORCH_BOX(&cuda_row_gradient)); }

}  // namespace vqkernels
