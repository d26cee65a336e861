// Deterministic segment sums: counts and sums of the rows of each code, and the codebook gradient.
//
// Two passes: a stable counting sort of the row numbers by code, then each code's rows are added in ascending order, in
// double, by the one thread that owns the code. No atomics, no one-hot; the order of every sum is fixed by the data.
// Memory: one row number per row and one offset per code.
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

// out[k] <- sum of the rows of k, for codes [first, last); `out` is (codebook_size, channels), contiguous.
void sum_segments(const Rows& rows, const Segments& segments, int64_t first, int64_t last, DType out_type, void* out);

// out[k] <- scale * sum over the rows of k of (e_k - row): the gradient of the codebook loss.
void codebook_gradient(const Rows& rows, const Codes& codebook, double scale, const Segments& segments, int64_t first,
                       int64_t last, void* out);

}  // namespace vqkernels
