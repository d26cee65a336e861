// Deterministic segment sums: counts and sums of the rows of each code, and the codebook gradient.
//
// Every sum adds its rows in ascending order, in double, and is rounded once, so neither threads nor the layout of z
// can change a bit. Where a row is contiguous, the row numbers are sorted by code (a stable counting sort) and each
// code's rows are added by the one thread that owns the code. Where the channels are apart (images, channels first)
// each thread owns channels instead and walks all rows, which are then contiguous. No atomics, no one-hot; memory: one
// row number per row and one offset or sum per code.
#pragma once
#include <stdint.h>

#include <vector>

#include "rows.h"

namespace vqkernels {

// Rows grouped by code: rows of code k are order[start[k]] ... order[start[k + 1] - 1], ascending.
struct Segments {
  std::vector<int64_t> start, order;
};

// `code` holds one code per row; rows with a negative one belong to no segment.
Segments group_by_code(const int32_t* code, int64_t rows, int64_t codebook_size);

// Splits the codes into `parts` ranges of about equal numbers of rows; returns parts + 1 boundaries.
std::vector<int64_t> balance_codes(const Segments& segments, int64_t parts);

// Whether a row holds finite values only.
bool finite_row(const Rows& rows, int64_t row);

// What is summed: the rows of each code, out[k] = sum of z; or, with a codebook, out[k] = scale * sum of (e_k - z), the
// gradient of the codebook loss. `out` is (codebook_size, channels), contiguous.
struct SegmentSum {
  Rows rows;
  const Codes* codebook;
  double scale;
  DType out_type;
  void* out;
};

// Writes out[k] for codes [first, last).
void sum_codes(const SegmentSum& sum, const Segments& segments, int64_t first, int64_t last);

// Writes channels [first, last) of every out[k]. `code` as in group_by_code.
void sum_channels(const SegmentSum& sum, const int32_t* code, int64_t codebook_size, int64_t first, int64_t last);

}  // namespace vqkernels
