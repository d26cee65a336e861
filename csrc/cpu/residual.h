// Residual quantization of a chunk of rows: every level's search, look-up, error and residual while the rows are in
// cache.
//
// Fused: all Q levels of kChunk rows, whose residual (kChunk x D) and sum of codes stay in L2; z is read once and
// quantized written once, whatever Q. Never built: N x K, N x Q x D. r_{q+1} = r_q - e is rounded once to the
// residual's type, float (double for double rows); the sum of codes is added in level order in float (double for double
// codes), so that decoding repeats it bit for bit. Every level's search obeys the contract on r_q; ties: lowest index.
// Errors are double, in a fixed order. A row's result depends on that row and the codebooks alone.
#pragma once
#include <stdint.h>

#include <memory>
#include <vector>

#include "nearest.h"
#include "quantize.h"

namespace vqkernels {

// One level's codebook, ready to be searched.
struct ResidualLevel {
  Codes codes;
  const PackedCodebook* packed;
  const IntegerCodebook* integers;
};

// The type in which residuals, or sums of codes, are kept.
inline DType residual_type(DType z) { return z == DType::f64 ? DType::f64 : DType::f32; }
inline DType sum_type(DType codes) { return residual_type(codes); }

// Rows of z as contiguous residuals (count, channels) of residual_type: r_0. Rows with passed[i] <= 0 are not read and
// become zeros; passed == nullptr means that all rows count.
void read_residuals(const Rows& z, int64_t begin, int64_t end, const int64_t* passed, void* residual);

// r <- r - e for contiguous residuals (count, channels), rounded once; rows with code[i] < 0 stay.
void subtract_codes(const Codes& codes, DType type, int64_t count, const int32_t* code, void* residual);

class ResidualSearch {
 public:
  // `levels` must outlive the search. z is only described: rows come by operator().
  ResidualSearch(const Rows& z, const std::vector<ResidualLevel>& levels, bool certified);

  // Rows [begin, end) of z, at most kChunk: quantized, index[i * Q + q] of every level (kMasked where it is not
  // passed), the squared error of each level summed per kBlock rows into error[q * stride + block], and, unless null,
  // the code that counts for the statistics, code[q * rows + i] (-1: none). passed[i]: levels of row begin + i, or null
  // for all.
  void operator()(const Rows& z, int64_t begin, int64_t end, const int64_t* passed, const RowsOut& quantized,
                  int64_t* index, double* error, int64_t stride, int32_t* code, int64_t rows);

 private:
  const std::vector<ResidualLevel>& levels_;
  const DType residual_type_, sum_type_;
  std::vector<double> residual_, sum_;  // raw storage of (kChunk, channels), float or double
  Rows view_;                           // of residual_
  std::vector<std::unique_ptr<NearestSearch>> searches_;
  std::vector<int64_t> found_;
  std::unique_ptr<bool[]> finite_, kept_;
};

// Gradient of z for rows [begin, end): through(grad_quantized) + sum over the levels passed of weight[q] (r_q - e_q); 0
// for a row that passes none, NaN for one that is not finite at a level it passes. Writes, unless null, the code that
// counts for each level's codebook gradient, code[q * rows + i] (-1: none). index[i * Q + q] of row begin + i.
void residual_gradient_rows(const Rows& z, const std::vector<Codes>& levels, const Rows& grad_quantized,
                            Gradient gradient, const double* weight, const RowsOut& grad_z, int64_t begin, int64_t end,
                            const int64_t* index, int32_t* code, int64_t rows);

}  // namespace vqkernels
