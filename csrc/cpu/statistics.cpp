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

void sum_segments(const Rows& rows, const Segments& segments, int64_t first, int64_t last, DType out_type, void* out) {
  std::vector<double> sum(rows.channels);
  with_type(rows.dtype, [&](auto* type) {
    for (int64_t k = first; k < last; ++k) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t i = segments.start[k]; i < segments.start[k + 1]; ++i) {
        const auto* x = static_cast<decltype(type)>(rows.data) + rows.offset(segments.order[i]);
        for (int64_t d = 0; d < rows.channels; ++d) sum[d] += double(widen(x[d * rows.channel_stride]));
      }
      with_type(out_type, [&](auto* target) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(target)>>;
        for (int64_t d = 0; d < rows.channels; ++d) narrow(sum[d], static_cast<T*>(out) + k * rows.channels + d);
      });
    }
  });
}

void codebook_gradient(const Rows& rows, const Codes& codebook, double scale, const Segments& segments, int64_t first,
                       int64_t last, void* out) {
  const int64_t channels = rows.channels;
  std::vector<double> sum(channels);
  with_type(rows.dtype, [&](auto* type) {
    with_type(codebook.dtype, [&](auto* code_type) {
      using C = std::remove_const_t<std::remove_pointer_t<decltype(code_type)>>;
      for (int64_t k = first; k < last; ++k) {
        const C* code = static_cast<const C*>(codebook.data) + k * channels;
        std::fill(sum.begin(), sum.end(), 0.0);
        for (int64_t i = segments.start[k]; i < segments.start[k + 1]; ++i) {
          const auto* x = static_cast<decltype(type)>(rows.data) + rows.offset(segments.order[i]);
          for (int64_t d = 0; d < channels; ++d)
            sum[d] += double(widen(code[d])) - double(widen(x[d * rows.channel_stride]));
        }
        const bool used = segments.start[k + 1] > segments.start[k];  // an unused code's gradient is 0 even at scale inf
        for (int64_t d = 0; d < channels; ++d)
          narrow(used ? scale * sum[d] : 0.0, static_cast<C*>(out) + k * channels + d);
      }
    });
  });
}

}  // namespace vqkernels
