// Nearest-code search on the CPU: fused float32 filter with a certificate, float64 contract for what it leaves open.
//
// Fused: centring, distances, running minimum and second minimum, certificate, re-scoring. Never built: the N x K matrix;
// scores live in registers. Traffic: z once, the packed codebook once per kChunk rows, indices once. Ties: lowest index.
// A row's result depends on that row and the codebook alone, so threads, batch splits and tilings cannot change it.
#pragma once
#include <stdint.h>

#include <vector>

#include "codebook.h"
#include "rows.h"

namespace vqkernels {

constexpr int64_t kChunk = 256;        // rows searched together: their panels stay in L2 while the codebook streams by
constexpr int64_t kMasked = -1;        // index of a masked row

class NearestSearch {
 public:
  NearestSearch(const Rows& rows, const PackedCodebook& codebook, bool certified);

  // Searches rows [begin, end), at most kChunk of them. mask[i] == false marks row begin + i as masked. Writes the code
  // index of each row (kMasked where masked, 0 where the row is not finite) and whether the row is finite; returns how
  // many of the unmasked rows the filter decided.
  int64_t operator()(int64_t begin, int64_t end, const bool* mask, int64_t* index, bool* finite);

 private:
  void read_offsets(int64_t begin, int64_t count, const bool* mask);
  void read_panel(const int64_t* offsets, int64_t count, float* panel, float* norm);
  bool row_is_finite(int64_t offset) const;
  void rescore(const int64_t* offsets, const float* thresholds, int64_t count, int64_t* index);

  const Rows& rows_;
  const PackedCodebook& codebook_;
  const Sweep& sweep_;
  const bool certified_;
  std::vector<float> zero_, panels_, norm_, best_, second_;
  std::vector<int32_t> slot_;
  std::vector<int64_t> offset_;  // of each row of the chunk in z; kMasked where it must not be read
  // Undecided rows of the chunk, and the buffers of their second pass.
  std::vector<int64_t> open_row_, open_offset_, open_index_;
  std::vector<float> open_threshold_;
  std::vector<int32_t> survivors_;
  std::vector<double> wide_panel_, wide_code_, score_, wide_best_;
};

}  // namespace vqkernels
