// Views that the CUDA kernels read, and how one element or 16 bytes of them are read.
#pragma once
#include "../cpu/element.h"
#include "portable.h"

namespace vqkernels {
namespace cuda {

// z as (batch, head, position, channel) by four strides in elements. Row r of a head is batch r / positions, position
// r % positions; across heads, rows are numbered head * count() + r.
struct Rows {
  const void* data;
  DType dtype;
  int64_t batch, heads, positions, channels;
  int64_t batch_stride, head_stride, position_stride, channel_stride;

  VQ_BOTH int64_t count() const { return batch * positions; }
  VQ_BOTH int64_t total() const { return heads * count(); }
};

// One number per row, an index or a byte of a mask: (batch, head, position) by three strides; data may be null.
struct PerRow {
  const void* data;
  int64_t batch_stride, head_stride, position_stride;
};

// Codebooks (head, code, channel) by three strides; data may be null.
struct Codes {
  const void* data;
  DType dtype;
  int64_t head_stride, code_stride, channel_stride;
};

// Where row `flat` stands. Both counts are below 2^31, which makes the divisions cheap.
struct Place {
  int64_t batch, head, position;
};

VQ_BOTH Place place_of(const Rows& rows, uint32_t flat) {
  const uint32_t count = uint32_t(rows.count()), positions = uint32_t(rows.positions);
  const uint32_t head = flat / count, row = flat - head * count, batch = row / positions;
  return {batch, head, row - batch * positions};
}

template <class Strided> VQ_BOTH int64_t offset_of(const Strided& x, const Place& place) {
  return place.batch * x.batch_stride + place.head * x.head_stride + place.position * x.position_stride;
}

// kWidth neighbouring elements, read at once; kWidth is 1 or fills 16 bytes.
template <class T, int kWidth> struct alignas(kWidth * sizeof(T)) Packet {
  T at[kWidth];
};

template <class T> constexpr int kPacket = 16 / int(sizeof(T));

VQ_BOTH int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Whether every row of z can be read in packets of 16 bytes.
VQ_BOTH bool takes_packets(const Rows& rows) {
  const int64_t width = 16 / size_of(rows.dtype);
  const auto fits = [&](int64_t stride, int64_t size) { return size <= 1 || stride % width == 0; };
  return rows.channel_stride == 1 && rows.channels % width == 0 && uint64_t(rows.data) % 16 == 0 &&
         fits(rows.batch_stride, rows.batch) && fits(rows.head_stride, rows.heads) &&
         fits(rows.position_stride, rows.positions);
}

// An element as double, of a type known at run time only: for what is read rarely.
VQ_BOTH double load_double(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::bf16: return double(widen(static_cast<const BFloat16*>(data)[at]));
    case DType::f16: return double(widen(static_cast<const Float16*>(data)[at]));
    case DType::f64: return static_cast<const double*>(data)[at];
    default: return double(static_cast<const float*>(data)[at]);
  }
}

VQ_BOTH void store_double(void* data, DType dtype, int64_t at, double x) {
  switch (dtype) {
    case DType::bf16: return narrow(x, static_cast<BFloat16*>(data) + at);
    case DType::f16: return narrow(x, static_cast<Float16*>(data) + at);
    case DType::f64: return narrow(x, static_cast<double*>(data) + at);
    default: return narrow(x, static_cast<float*>(data) + at);
  }
}

// inf - inf and NaN - NaN are NaN. What is not double is judged as float: float64 is slow on many GPUs.
VQ_BOTH bool is_finite(float x) { return x - x == 0.0f; }
VQ_BOTH bool is_finite(double x) { return x - x == 0.0; }

}  // namespace cuda
}  // namespace vqkernels
