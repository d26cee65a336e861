// vqkernels::cuda_nearest: nearest codes and, if asked for, what quantization makes of them, on the GPU.
#include "../cuda/lookup.h"
#include "../cuda/nearest.h"

#include "cuda_views.h"

namespace vqkernels {
namespace {

cuda::Problem problem_of(const Tensor& z, const Tensor& codebook, const std::optional<Tensor>& mask,
                         const std::string& metric, const std::string& precision) {
  STD_TORCH_CHECK(z.dim() == 4 && codebook.dim() == 3 && (!mask || mask->dim() == 3),
                  "z, codebook and mask must be in canonical form");
  STD_TORCH_CHECK(codebook.size(0) == z.size(1) && codebook.size(2) == z.size(3),
                  "z and codebook differ in heads or channels");
  STD_TORCH_CHECK(!mask || mask->scalar_type() == ScalarType::Bool, "mask must be bool");
  return {cuda_rows(z),     cuda_codes(codebook), cuda_per_row(mask),
          codebook.size(1), metric_of(metric),    precision != "fast"};
}

}  // namespace

// How many bytes of workspace the call takes on a GPU of that many multiprocessors.
int64_t cuda_nearest_workspace(const Tensor& z, const Tensor& codebook, std::optional<Tensor> mask, std::string metric,
                               std::string precision, int64_t processors) {
  const cuda::Problem problem = problem_of(z, codebook, mask, metric, precision);
  size_t bytes = 0;
  check_cuda(vqkernels_cuda_nearest_workspace(&problem, int(processors), &bytes), "the nearest-code search");
  return int64_t(bytes);
}

// Fills indices (batch, head, position) int64 and decided () int64; with quantized (of z's sizes and dtype), also that
// and squared_error () float64. Returns how many kernels it launched.
int64_t cuda_nearest(const Tensor& z, const Tensor& codebook, std::optional<Tensor> mask, std::string metric,
                     std::string precision, Tensor indices, Tensor decided, std::optional<Tensor> quantized,
                     std::optional<Tensor> squared_error, Tensor workspace, int64_t processors, int64_t stream) {
  const cuda::Problem problem = problem_of(z, codebook, mask, metric, precision);
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && decided.scalar_type() == ScalarType::Long &&
                      indices.dim() == 3 && indices.numel() == problem.z.total(),
                  "indices and decided must be int64, one index per row");
  STD_TORCH_CHECK(!quantized || (quantized->dim() == 4 && quantized->scalar_type() == z.scalar_type() &&
                                 quantized->numel() == z.numel() && squared_error &&
                                 squared_error->scalar_type() == ScalarType::Double),
                  "quantized must be like z, squared_error float64");
  const cuda::Output out = {cuda_per_row(indices), quantized ? cuda_rows(*quantized) : cuda::Rows{},
                            squared_error ? static_cast<double*>(squared_error->mutable_data_ptr()) : nullptr};
  int launches = 0;
  check_cuda(
      vqkernels_cuda_nearest(&problem, &out, static_cast<int64_t*>(decided.mutable_data_ptr()), int(processors),
                             workspace.mutable_data_ptr(), size_t(workspace.numel()), &launches, stream_of(stream)),
      "the nearest-code search");
  return launches;
}

int64_t cuda_lookup_workspace(const Tensor& z, const Tensor& codebook) {
  const cuda::Problem problem = problem_of(z, codebook, std::nullopt, "euclidean", "exact");
  size_t bytes = 0;
  check_cuda(vqkernels_cuda_lookup_workspace(&problem, &bytes), "the look-up");
  return int64_t(bytes);
}

// Fills quantized, of z's sizes and dtype, and squared_error () float64 from indices (batch, head, position) int64.
void cuda_lookup(const Tensor& z, const Tensor& codebook, const Tensor& indices, Tensor quantized, Tensor squared_error,
                 Tensor workspace, int64_t stream) {
  const cuda::Problem problem = problem_of(z, codebook, std::nullopt, "euclidean", "exact");
  STD_TORCH_CHECK(
      indices.scalar_type() == ScalarType::Long && indices.dim() == 3 && indices.numel() == problem.z.total(),
      "indices must be int64, one per row");
  STD_TORCH_CHECK(quantized.dim() == 4 && quantized.scalar_type() == z.scalar_type() &&
                      quantized.numel() == z.numel() && squared_error.scalar_type() == ScalarType::Double,
                  "quantized must be like z, squared_error float64");
  const cuda::Output out = {cuda_per_row(indices), cuda_rows(quantized),
                            static_cast<double*>(squared_error.mutable_data_ptr())};
  check_cuda(
      vqkernels_cuda_lookup(&problem, &out, workspace.mutable_data_ptr(), size_t(workspace.numel()), stream_of(stream)),
      "the look-up");
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_nearest_workspace", TORCH_BOX(&cuda_nearest_workspace));
  m.impl("cuda_lookup_workspace", TORCH_BOX(&cuda_lookup_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) {
  m.impl("cuda_nearest", TORCH_BOX(&cuda_nearest));
  m.impl("cuda_lookup", TORCH_BOX(&cuda_lookup));
}

}  // namespace vqkernels
