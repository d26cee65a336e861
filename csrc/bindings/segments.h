// Threads for the segment sums, shared by the statistics and quantize operators.
#pragma once
#include "../cpu/statistics.h"
#include "views.h"

namespace vqkernels {

struct Statistics {
  Tensor counts, sums;
};

inline ScalarType sums_type(const Tensor& z) {
  return z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Statistics empty_statistics(const Tensor& z, const Layout& layout, int64_t codebook_size) {
  return {torch::stable::empty({layout.heads, codebook_size}, ScalarType::Long),
          torch::stable::empty({layout.heads, codebook_size, layout.channels}, sums_type(z))};
}

inline Statistics no_statistics(const Tensor& z) {
  return {torch::stable::empty({0}, ScalarType::Long), torch::stable::empty({0}, sums_type(z))};
}

// Runs a segment sum on torch's threads: over codes where rows are contiguous, over channels where they are apart.
inline void run_segment_sum(const SegmentSum& sum, const std::vector<int32_t>& code, const Segments& segments,
                            int64_t codebook_size) {
  if (sum.rows.channel_stride != 1 && sum.rows.channels > 1) {
    parallel_for(sum.rows.channels, 1,
                 [&](int64_t first, int64_t last) { sum_channels(sum, code.data(), codebook_size, first, last); });
    return;
  }
  const int64_t parts = int64_t(torch::stable::get_num_threads()) * 4;
  const std::vector<int64_t> boundary = balance_codes(segments, parts);
  parallel_for(parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) sum_codes(sum, segments, boundary[part], boundary[part + 1]);
  });
}

// Writes one head of the statistics from the code of each row (negative: the row counts nowhere).
inline void write_statistics(const Rows& rows, const std::vector<int32_t>& code, int64_t codebook_size, int64_t head,
                             Statistics& out) {
  const Segments segments = group_by_code(code.data(), rows.count(), codebook_size);
  int64_t* counts = static_cast<int64_t*>(out.counts.mutable_data_ptr()) + head * codebook_size;
  for (int64_t k = 0; k < codebook_size; ++k) counts[k] = segments.start[k + 1] - segments.start[k];
  const DType type = dtype_of(out.sums);
  char* sums =
      static_cast<char*>(out.sums.mutable_data_ptr()) + head * codebook_size * rows.channels * element_size(type);
  run_segment_sum({rows, nullptr, 1.0, type, sums}, code, segments, codebook_size);
}

}  // namespace vqkernels
