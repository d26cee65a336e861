// What follows the search, while the rows are still in cache: look-up, residual, squared error; and the backward pass.
//
// Fused: gather, rounding to z's dtype, writing in z's layout, direct residual z - e, squared error. Nothing N x K and
// no one-hot is built. Arithmetic is double, so the losses are those of the stored values; sums run in a fixed order.
#pragma once
#include <stdint.h>

#include "rows.h"

namespace vqkernels {

constexpr int64_t kBlock = 32;  // rows whose squared errors are one partial sum, whatever the chunk and the threads

// A tensor of z's dtype and sizes that is written; its rows may be grouped by other strides than z's.
struct RowsOut {
  void* data;
  int64_t positions, batch_stride, position_stride, channel_stride;

  int64_t offset(int64_t row) const { return (row / positions) * batch_stride + (row % positions) * position_stride; }
};

// quantized <- the code of each row in [begin, end), zeros where index < 0. Returns the summed squared error of the
// rows with index >= 0: NaN if one of them is not finite.
double gather_rows(const Rows& z, const Codes& codebook, const RowsOut& quantized, int64_t begin, int64_t end,
                   const int64_t* index, const bool* finite);

// finite[i] <- whether row begin + i holds finite values only, for rows [begin, end) with index >= 0; the others are
// not read.
void mark_finite(const Rows& z, int64_t begin, int64_t end, const int64_t* index, bool* finite);

// How the gradient of quantized reaches z: unchanged, or rotated (rotation.h).
enum class Gradient : int { straight_through, rotation };

// grad_z <- through(grad_quantized) + scale (z - e) for rows [begin, end); 0 where index < 0; NaN where the row is not
// finite. Writes finite[i] for the rows with index >= 0.
void gradient_rows(const Rows& z, const Codes& codebook, const Rows& grad_quantized, Gradient gradient, double scale,
                   const RowsOut& grad_z, int64_t begin, int64_t end, const int64_t* index, bool* finite);

}  // namespace vqkernels
