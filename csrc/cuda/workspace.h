// How the memory that a caller lends to a launcher is divided: a plan made of sizes alone, so it can be tested
// anywhere.
#pragma once
#include <type_traits>

#include "segments.h"

namespace vqkernels {
namespace cuda {

// Byte offsets into the workspace of segment sums. The sort moves keys and row numbers to and fro between two copies.
struct SumWorkspace {
  int64_t keys[2], order[2], start, partials, sort, bytes;
};

VQ_BOTH SumWorkspace plan_sums(int64_t total, int64_t groups, int64_t channels, int64_t sort_bytes) {
  SumWorkspace plan = {};
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at = end;
    end += blocks_of(bytes, 256) * 256;
    return at;
  };
  for (int i = 0; i < 2; ++i) plan.keys[i] = take(total * 4), plan.order[i] = take(total * 4);
  plan.start = take((groups + 1) * 4);
  plan.partials = take(2 * chunks_of(total) * channels * 8);
  plan.sort = take(sort_bytes);
  plan.bytes = end;
  return plan;
}

// How many bits a sort must look at to tell the keys 0 ... groups apart.
VQ_BOTH int key_bits(int64_t groups) {
  int bits = 1;
  while ((groups >> bits) != 0) ++bits;
  return bits;
}

// Rows and keys are numbered in 32 bits, a sign to spare.
VQ_BOTH bool fits_sums(int64_t total, int64_t groups) {
  return total < (int64_t(1) << 31) && groups < (int64_t(1) << 31);
}

}  // namespace cuda
}  // namespace vqkernels
