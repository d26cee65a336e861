// vqkernels::cuda_segment_sums: counts and sums of rows by code, and the codebook's gradient, on the GPU.
#include "../cuda/statistics.h"

#include "cuda_views.h"

namespace vqkernels {

int64_t cuda_segment_sums_workspace(int64_t rows, int64_t groups, int64_t channels) {
  size_t bytes = 0;
  check_cuda(vqkernels_cuda_segment_sums_workspace(rows, groups, channels, &bytes), "segment sums");
  return int64_t(bytes);
}

// Fills counts (heads, codes) int64 and sums (heads, codes, channels), both contiguous; with a codebook, the sums are
// those of e - z times 2 grad / elements. The workspace is a tensor of bytes, as many as the query names.
void cuda_segment_sums(const Tensor& z, const Tensor& indices, std::optional<Tensor> mask, int64_t codes,
                       std::optional<Tensor> codebook, std::optional<Tensor> grad, std::optional<Tensor> elements,
                       std::optional<Tensor> counts, Tensor sums, Tensor workspace, int64_t stream) {
  STD_TORCH_CHECK(
      z.dim() == 4 && indices.dim() == 3 && (!mask || mask->dim() == 3) && (!codebook || codebook->dim() == 3),
      "z, indices, mask and codebook must be in canonical form");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && (!mask || mask->scalar_type() == ScalarType::Bool) &&
                      (!counts || counts->scalar_type() == ScalarType::Long) &&
                      (!elements || elements->scalar_type() == ScalarType::Long),
                  "indices, counts and elements must be int64, the mask bool");
  STD_TORCH_CHECK(sums.numel() == z.size(1) * codes * z.size(3) && (!counts || counts->numel() == z.size(1) * codes),
                  "counts must have one element per code, sums one row per code");
  cuda::SegmentSums what = {};
  what.z = cuda_rows(z);
  what.indices = cuda_per_row(indices);
  what.mask = cuda_per_row(mask);
  what.codes = codes;
  what.codebook = cuda_codes(codebook);
  what.grad = data_or_null(grad);
  what.grad_type = grad ? dtype_of(*grad) : DType::f32;
  what.elements = static_cast<const int64_t*>(data_or_null(elements));
  what.counts = counts ? static_cast<int64_t*>(counts->mutable_data_ptr()) : nullptr;
  what.sums = sums.mutable_data_ptr();
  what.sums_type = dtype_of(sums);
  check_cuda(
      vqkernels_cuda_segment_sums(&what, workspace.mutable_data_ptr(), size_t(workspace.numel()), stream_of(stream)),
      "segment sums");
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_segment_sums_workspace", TORCH_BOX(&cuda_segment_sums_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) { m.impl("cuda_segment_sums", TORCH_BOX(&cuda_segment_sums)); }

}  // namespace vqkernels
