// One search of the raw kernels, as the operator `vqkernels::nearest` runs it on one thread.
//
// The native drivers call the search through this file alone, so that a change of its interface is made in one place.
#pragma once
#include <math.h>

#include <algorithm>
#include <vector>

#include "../../csrc/cpu/environment.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/nearest.h"

namespace native {

using namespace vqkernels;

struct Query {
  Rows rows;
  Codes codes;
  Metric metric = Metric::euclidean;
  const Sweep* sweep = nullptr;
  bool certified = true;
  bool integers = true;  // false: the float32 filter alone
  const bool* mask = nullptr;
};

inline void serially(int64_t count, const std::function<void(int64_t, int64_t)>& f) { f(0, count); }

// Writes the index of each row (-1 where masked) and whether it is finite; returns how many rows the filters decided.
inline int64_t search(const Query& q, int64_t* index, bool* finite, int64_t step = kChunk) {
  const DefaultArithmetic arithmetic;
  const PackedCodebook packed(q.codes, q.rows.dtype, q.metric, q.certified, *q.sweep);
  const IntegerCodebook integers(
      packed, q.integers ? integer_row_norm(q.rows, packed, q.mask, q.certified) : double(NAN), serially);
  NearestSearch run(q.rows, packed, integers, q.certified);
  int64_t decided = 0;
  for (int64_t begin = 0; begin < q.rows.count(); begin += step)
    decided += run(begin, std::min(begin + step, q.rows.count()), q.mask ? q.mask + begin : nullptr, index + begin,
                   finite + begin);
  return decided;
}

inline Rows contiguous(const void* data, DType dtype, int64_t count, int64_t channels) {
  return {data, dtype, 1, count, channels, 0, channels, 1};
}

}  // namespace native
