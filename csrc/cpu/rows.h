// Views of the tensors that the kernels read: raw pointers, sizes and strides in elements.
#pragma once
#include <stdint.h>

#include "element.h"

namespace vqkernels {

// z of one head: row r = (batch r / positions, position r % positions), element d at stride channel_stride.
struct Rows {
  const void* data;
  DType dtype;
  int64_t batch, positions, channels;
  int64_t batch_stride, position_stride, channel_stride;

  int64_t count() const { return batch * positions; }
  int64_t offset(int64_t row) const { return (row / positions) * batch_stride + (row % positions) * position_stride; }
};

// One codebook (size, channels), contiguous.
struct Codes {
  const void* data;
  DType dtype;
  int64_t size, channels;
};

enum class Metric : int { euclidean, dot, cosine };

}  // namespace vqkernels
