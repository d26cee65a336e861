// Nearest-code search on the CPU: integer and float32 filters with certificates, the float64 contract for what they
// leave.
//
// Three filters in a row, each exact about what it decides: int8 and int16 (codebook16.h), float32 (codebook.h),
// float64 (the contract itself, on the codes that could still win). Fused: centring, rounding, distances, minima,
// certificates, re-scoring. Never built: the N x K matrix; scores live in registers. Traffic: z once; the packed
// codebook once per panel (integers) or per kChunk rows (float32), from cache; indices once. Ties: lowest index. A
// row's result depends on that row and the codebook alone, so threads, batch splits and tilings cannot change it.
#pragma once
#include <stdint.h>

#include <memory>
#include <vector>

#include "codebook.h"
#include "codebook16.h"
#include "integer_filter.h"
#include "rows.h"

namespace vqkernels {

constexpr int64_t kChunk = 256;  // rows searched together: their panels stay in L2 while the codebook streams by
constexpr int64_t kMasked = -1;  // index of a masked row

class NearestSearch {
 public:
  NearestSearch(const Rows& rows, const PackedCodebook& codebook, const IntegerCodebook& integers, bool certified);

  // Searches rows [begin, end), at most kChunk of them. mask[i] == false marks row begin + i as masked. Writes the code
  // index of each row (kMasked where masked, 0 where the row is not finite) and whether the row is finite; returns how
  // many of the unmasked rows the filters decided without the contract.
  int64_t operator()(int64_t begin, int64_t end, const bool* mask, int64_t* index, bool* finite);

 private:
  // Rows of the chunk that are still to be searched: their number in the chunk and their offset in z.
  struct Pending {
    std::vector<int64_t> row, offset;
    void clear() { row.clear(), offset.clear(); }
    void add(int64_t r, int64_t o) { row.push_back(r), offset.push_back(o); }
    int64_t size() const { return int64_t(row.size()); }
  };

  int64_t panels(const Pending& rows) const { return (rows.size() + sweep_.rows - 1) / sweep_.rows; }
  void read_panels(const Pending& rows);
  void read_panel(const int64_t* offsets, int64_t count, float* panel);
  bool row_is_finite(int64_t offset) const;
  void filter_in_integers(int64_t* index, bool* finite);
  void filter_in_float(int64_t* index, bool* finite);
  int64_t contract_winner(int64_t offset, const int32_t* survivors, int32_t count);
  void rescore(const int64_t* offsets, const float* thresholds, int64_t count, int64_t* index);

  const Rows& rows_;
  const PackedCodebook& codebook_;
  const IntegerCodebook& integers_;
  const Sweep& sweep_;
  const bool certified_;
  std::unique_ptr<IntegerFilter> integer_filter_;
  Pending pending_, open_;
  int64_t contracted_ = 0;  // rows of this chunk that the contract decided among a few survivors
  std::vector<float> zero_, panels_, norm_, best_, second_, threshold_;
  std::vector<int32_t> slot_;
  // Buffers of the float64 pass.
  std::vector<int32_t> survivors_;
  std::vector<double> wide_row_, wide_panel_, wide_code_, score_, wide_best_;
};

// The row norm that IntegerCodebook wants for these rows; NaN where the float32 filter alone is the better choice.
double integer_row_norm(const Rows& rows, const PackedCodebook& codebook, const bool* mask, bool certified);

}  // namespace vqkernels
