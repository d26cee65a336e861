// Entropies of soft assignments p_i = softmax_j(l_ij) of rows to codes, and their gradients.
//
// Fused: products, logits, 2^x, running log-sum-exp and running sum of p l in one sweep of a panel of rows over all
// codes; the mean assignment in a sweep of a panel of codes over all rows; in the backward pass the same two sweeps
// again, with the sums that the gradients of rows and of codes are made of. Logits and probabilities live for a block
// of kTogether tiles, in the first-level cache: nothing N x K is ever built, and beyond inputs and outputs there is one
// packed copy of the rows and one of the codes. Every panel is summed by one thread in a fixed order, without atomics:
// no bit depends on the threads.
//
// Logits are in units of log 2 and without the row's own constant: l_ij = bias_j + x_i . y_j, with x_i = s log2(e) (z_i
// - c) (dot: s log2(e) z_i), y_j = e_j - c, c the codes' mean, s = 2 / temperature (dot: 1 / temperature), and bias_j =
// -|y_j|^2 log2(e) / temperature (dot: 0). A row or a code may be the lane: the same operations in the same order make
// the same bits. Float is the working type unless an input is double or logits leave the range in which a float has a
// fraction. A probability below 2^-126 (double: 2^-1022) is exactly 0, and whatever it would be multiplied with is left
// out.
#pragma once
#include <stdint.h>

#include <vector>

#include "parallel.h"
#include "quantize.h"
#include "rows.h"

namespace vqkernels {

constexpr int kTogether = 8;  // tiles in a block
constexpr int kFlush = 16;    // blocks that are summed in the working type before they enter a double

// Rows or codes that pass by the lanes, kTile of them side by side; the last tile is filled up with items of no weight.
template <class Real> struct Stream {
  const Real* values;     // [tile][channel][item]
  const Real* bias;       // [item]; of codes
  const Real* weight;     // [item]; backward: of codes, minus the gradient with respect to the mean assignment
  const Real* partition;  // [item]; of rows, log2 of the sum of 2^l
  const Real* share;      // [item]; of rows, what 2^(l - partition) is multiplied with
  const Real* constant;   // [item]; backward: of rows, added to the weight of every code
  int64_t tiles, channels;
};

// The sweeps of one panel of `lanes` rows or codes, [channel][lane], one set per SIMD level (kernels.h).
template <class Real> struct EntropyKernels {
  int lanes, tile;

  // Rows over codes: log2 of the sum of 2^l rounded to Real, 1 / sum of 2^(l - partition), and the entropy in nats.
  void (*forward)(const Real* panel, const Stream<Real>& codes, Real* partition, Real* share, double* entropy);

  // Codes over rows: the sum of the probabilities of each code.
  void (*mean)(const Real* panel, const Real* bias, const Stream<Real>& rows, double* sum);

  // Rows over codes, with w = slope (l - partition) + constant + weight: the sums of p, of p w, and, [channel][lane]
  // behind one another, of p y and of p w y. p is 2^(l - partition). `scratch` holds 2 channels lanes Reals.
  void (*rows_backward)(const Real* panel, const Stream<Real>& codes, const Real* partition, const Real* constant,
                        Real slope, double* sum, double* weighted, double* gradient, Real* scratch);

  // Codes over rows, with g = p share w: the sums of g and, [channel][lane], of g x.
  void (*codes_backward)(const Real* panel, const Real* bias, const Real* weight, const Stream<Real>& rows, Real slope,
                         double* sum, double* gradient, Real* scratch);

  void (*exponential)(const Real* x, Real* y, int64_t count);  // 2^x, for tests
};

extern const EntropyKernels<double> kEntropyDouble;  // the same at every level

// One head's rows that count, its finite codes, and how they are scaled.
struct EntropyInputs {
  EntropyInputs(const Rows& rows, const Codes& codes, const bool* mask, bool euclidean, double temperature,
                const Parallel& parallel);

  Rows rows;
  Codes codes;
  bool euclidean;
  double temperature;
  std::vector<int64_t> row;    // unmasked and finite, ascending
  std::vector<int64_t> bad;    // unmasked and not finite
  std::vector<int64_t> code;   // finite
  std::vector<double> centre;  // the mean of the finite codes
  bool in_float;               // whether float32 logits are good enough

  double scale() const { return (euclidean ? 2.0 : 1.0) / temperature; }
};

// Of each counted row and each finite code, in the order of EntropyInputs.
struct Entropies {
  std::vector<double> entropy, partition, mean;
};

template <class Real>
Entropies entropies(const EntropyInputs& inputs, const EntropyKernels<Real>& kernels, const Parallel& parallel);

// Writes the gradients of counted rows into grad_z, and those of finite codes into grad_codebook (codes' dtype; null:
// not wanted). `known` is what the forward pass found; where its partitions are empty, they are found again.
template <class Real>
void entropy_gradients(const EntropyInputs& inputs, const EntropyKernels<Real>& kernels, const Entropies& known,
                       double grad_sample, double grad_codebook_entropy, const RowsOut& grad_z, void* grad_codebook,
                       const Parallel& parallel);

// Every channel of some rows <- a value.
void fill_rows(const RowsOut& out, DType dtype, int64_t channels, const std::vector<int64_t>& rows, double value);

}  // namespace vqkernels
