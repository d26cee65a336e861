// Draws a code for every row with probability proportional to exp(score / temperature), score = -|z - e|^2, z.e or
// z.e / |e|: the Gumbel-max trick inside the search. The code with the largest score / temperature + G is such a draw
// if the G are independent Gumbel numbers; here they are functions of (seed, head, row number, code), see counter.h.
//
// Fused: scores, random bits, running maximum. Never built: N x K anything. Scores are float32, summed over channels in
// order, from centred and scaled differences: no cancellation, and the same bits at every SIMD level. A row whose
// scores leave the range of float32 all the same is drawn for in double. The two logarithms of a Gumbel
// number are taken for few codes: with v = (bits + 1/2) 2^-32 and G = -log(-log(1 - v)), G <= -log v, and the exponent
// of v bounds that; a code whose bound stays below the row's running maximum is passed over. Ties: lowest index.
#pragma once
#include <stdint.h>

#include <vector>

#include "rows.h"

namespace vqkernels {

constexpr int64_t kSampleRows = 16;  // rows of one panel, a lane each

// The finite codes of one codebook as the kernels read them.
struct SampleCodes {
  SampleCodes(const Codes& codebook, Metric metric);

  Codes source;
  Metric metric;
  int64_t channels;
  std::vector<double> centre;  // subtracted from codes and rows; zeros unless euclidean
  std::vector<double> norm;    // of each finite code, for the cosine; empty otherwise
  double scale;                // a power of two that brings the largest element below 1
  std::vector<float> codes;    // [slot][channel], centred and scaled, or divided by their norm
  std::vector<int32_t> index;  // slot -> code, ascending
};

// Draws for rows [begin, end): kSampleRows of them at most. mask[i] == false marks row begin + i. Row numbers begin at
// `number`. Writes the code of each row: -1 where masked, 0 where the row is not finite or no code is.
void sample_rows(const Rows& rows, const SampleCodes& codes, double temperature, uint64_t start, int64_t number,
                 int64_t begin, int64_t end, const bool* mask, int64_t* index);

// What the inner kernel reads and writes (kernels.h): for each lane the largest a / temperature + G over all codes, and
// its slot; a is minus the squared distance or the product. -inf where no score is a number.
struct SamplePanel {
  const float* rows;    // [channel][kSampleRows]
  const uint32_t* low;  // halves of each row's key
  const uint32_t* high;
  const float* codes;    // [slot][channel]
  const int32_t* index;  // of each slot
  int64_t count, channels;
  bool euclidean;
  const double* inverse;  // 1 / temperature in the units of each row's scores
  double* best;
  int32_t* slot;
};

// -log(-log(1 - v)) for v = (bits + 1/2) 2^-32.
double gumbel(uint32_t bits);

}  // namespace vqkernels
