#include "statistics.h"

#include <math.h>

#include <algorithm>
#include <type_traits>

namespace vqkernels {

Segments group_by_code(const int32_t* code, int64_t rows, int64_t codebook_size) {
  Segments segments;
  segments.start.assign(codebook_size + 1, 0);
  for (int64_t i = 0; i < rows; ++i)
    if (code[i] >= 0) ++segments.start[code[i] + 1];
  for (int64_t k = 0; k < codebook_size; ++k) segments.start[k + 1] += segments.start[k];
  segments.order.resize(segments.start[codebook_size]);
  std::vector<int64_t> next(segments.start.begin(), segments.start.end() - 1);
  for (int64_t i = 0; i < rows; ++i)
    if (code[i] >= 0) segments.order[next[code[i]]++] = i;
  return segments;
}

std::vector<int64_t> balance_codes(const Segments& segments, int64_t parts) {
  const int64_t size = int64_t(segments.start.size()) - 1, rows = int64_t(segments.order.size());
  std::vector<int64_t> boundary(parts + 1, size);
  boundary[0] = 0;
  for (int64_t p = 1; p < parts; ++p) {
    // A code costs its rows plus one: even an empty segment is written.
    const int64_t target = (rows + size) * p / parts;
    int64_t low = boundary[p - 1], high = size;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (segments.start[middle] + middle < target) low = middle + 1;
      else high = middle;
    }
    boundary[p] = low;
  }
  return boundary;
}

bool finite_row(const Rows& rows, int64_t row) {
  return with_type(rows.dtype, [&](auto* type) {
    const auto* x = static_cast<decltype(type)>(rows.data) + rows.offset(row);
    double poison = 0.0;  // x * 0 is NaN exactly where x is not finite
    for (int64_t d = 0; d < rows.channels; ++d) poison += double(widen(x[d * rows.channel_stride])) * 0.0;
    return poison == 0.0;
  });
}

namespace {

// Calls f with null pointers of the types of z, of the codebook (z's own where there is none) and of the output.
template <class F> void with_types(const SegmentSum& sum, F&& f) {
  with_type(sum.rows.dtype, [&](auto* z) {
    with_type(sum.codebook ? sum.codebook->dtype : DType::f32, [&](auto* code) {
      with_type(sum.out_type, [&](auto* out) {
        f(static_cast<std::remove_const_t<std::remove_pointer_t<decltype(z)>>*>(nullptr),
          static_cast<std::remove_const_t<std::remove_pointer_t<decltype(code)>>*>(nullptr),
          static_cast<std::remove_const_t<std::remove_pointer_t<decltype(out)>>*>(nullptr));
      });
    });
  });
}

}  // namespace

void sum_codes(const SegmentSum& sum, const Segments& segments, int64_t first, int64_t last) {
  const Rows& rows = sum.rows;
  const int64_t channels = rows.channels;
  std::vector<double> total(channels), code(channels, 0.0);
  with_types(sum, [&](auto* z_type, auto* code_type, auto* out_type) {
    using Z = std::remove_pointer_t<decltype(z_type)>;
    using C = std::remove_pointer_t<decltype(code_type)>;
    using Out = std::remove_pointer_t<decltype(out_type)>;
    for (int64_t k = first; k < last; ++k) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t d = 0; sum.codebook && d < channels; ++d)
        code[d] = double(widen(static_cast<const C*>(sum.codebook->data)[k * channels + d]));
      for (int64_t i = segments.start[k]; i < segments.start[k + 1]; ++i) {
        const Z* x = static_cast<const Z*>(rows.data) + rows.offset(segments.order[i]);
        if (sum.codebook)
          for (int64_t d = 0; d < channels; ++d) total[d] += code[d] - double(widen(x[d * rows.channel_stride]));
        else
          for (int64_t d = 0; d < channels; ++d) total[d] += double(widen(x[d * rows.channel_stride]));
      }
      const bool used = segments.start[k + 1] > segments.start[k];  // an unused code's sum is 0 even at scale inf
      for (int64_t d = 0; d < channels; ++d)
        narrow(used ? sum.scale * total[d] : 0.0, static_cast<Out*>(sum.out) + k * channels + d);
    }
  });
}

void sum_channels(const SegmentSum& sum, const int32_t* code, int64_t codebook_size, int64_t first, int64_t last) {
  const Rows& rows = sum.rows;
  std::vector<double> total(codebook_size), shift(codebook_size, 0.0);
  std::vector<bool> used(codebook_size, false);
  for (int64_t row = 0; row < rows.count(); ++row)
    if (code[row] >= 0) used[code[row]] = true;
  with_types(sum, [&](auto* z_type, auto* code_type, auto* out_type) {
    using Z = std::remove_pointer_t<decltype(z_type)>;
    using C = std::remove_pointer_t<decltype(code_type)>;
    using Out = std::remove_pointer_t<decltype(out_type)>;
    for (int64_t d = first; d < last; ++d) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t k = 0; sum.codebook && k < codebook_size; ++k)
        shift[k] = double(widen(static_cast<const C*>(sum.codebook->data)[k * rows.channels + d]));
      for (int64_t b = 0; b < rows.batch; ++b) {
        const Z* x = static_cast<const Z*>(rows.data) + b * rows.batch_stride + d * rows.channel_stride;
        const int32_t* k = code + b * rows.positions;
        for (int64_t p = 0; p < rows.positions; ++p) {
          if (k[p] < 0) continue;
          const double value = double(widen(x[p * rows.position_stride]));
          total[k[p]] += sum.codebook ? shift[k[p]] - value : value;
        }
      }
      for (int64_t k = 0; k < codebook_size; ++k)
        narrow(used[k] ? sum.scale * total[k] : 0.0, static_cast<Out*>(sum.out) + k * rows.channels + d);
    }
  });
}

}  // namespace vqkernels
