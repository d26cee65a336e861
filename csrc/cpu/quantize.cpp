#include "quantize.h"

#include <math.h>

#include <limits>
#include <type_traits>

namespace vqkernels {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int kPartials = 8;  // independent sums of one row: their order is fixed, and they hide the latency of the add

template <class T> T* at(const RowsOut& out, int64_t row) { return static_cast<T*>(out.data) + out.offset(row); }

template <class T> const T* at(const Rows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + rows.offset(row);
}

// Squared error of one row, eight interleaved partial sums added pairwise; writes the code on the way.
template <class T, class C>
double gather_row(const T* z, int64_t z_stride, const C* code, T* out, int64_t out_stride, int64_t channels) {
  double partial[kPartials] = {};
  int64_t d = 0;
  for (; d + kPartials <= channels; d += kPartials) {
    for (int64_t i = 0; i < kPartials; ++i) {
      const double e = double(widen(code[d + i])), residual = double(widen(z[(d + i) * z_stride])) - e;
      narrow(e, &out[(d + i) * out_stride]);
      partial[i] += residual * residual;
    }
  }
  for (int64_t i = 0; d + i < channels; ++i) {
    const double e = double(widen(code[d + i])), residual = double(widen(z[(d + i) * z_stride])) - e;
    narrow(e, &out[(d + i) * out_stride]);
    partial[i] += residual * residual;
  }
  return ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
         ((partial[1] + partial[5]) + (partial[3] + partial[7]));
}

template <class T, class C> void copy_row(const C* code, T* out, int64_t stride, int64_t channels) {
  for (int64_t d = 0; d < channels; ++d) narrow(double(widen(code[d])), &out[d * stride]);
}

template <class T> void fill_row(double value, T* out, int64_t stride, int64_t channels) {
  for (int64_t d = 0; d < channels; ++d) narrow(value, &out[d * stride]);
}

}  // namespace

double gather_rows(const Rows& z, const Codes& codebook, const RowsOut& quantized, int64_t begin, int64_t end,
                   const int64_t* index, const bool* finite) {
  double total = 0.0;
  with_type(z.dtype, [&](auto* z_type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(z_type)>>;
    with_type(codebook.dtype, [&](auto* code_type) {
      using C = std::remove_const_t<std::remove_pointer_t<decltype(code_type)>>;
      for (int64_t row = begin; row < end; ++row) {
        T* out = at<T>(quantized, row);
        const int64_t k = index[row - begin];
        if (k < 0) {
          fill_row(0.0, out, quantized.channel_stride, z.channels);
          continue;
        }
        const C* code = static_cast<const C*>(codebook.data) + k * codebook.channels;
        if (finite[row - begin]) {
          total += gather_row(at<T>(z, row), z.channel_stride, code, out, quantized.channel_stride, z.channels);
        } else {
          copy_row(code, out, quantized.channel_stride, z.channels);
          total = kNaN;
        }
      }
    });
  });
  return total;
}

void gradient_rows(const Rows& z, const Codes& codebook, const Rows& grad_quantized, double scale,
                   const RowsOut& grad_z, int64_t begin, int64_t end, const int64_t* index, bool* finite) {
  const int64_t channels = z.channels;
  with_type(z.dtype, [&](auto* z_type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(z_type)>>;
    with_type(codebook.dtype, [&](auto* code_type) {
      using C = std::remove_const_t<std::remove_pointer_t<decltype(code_type)>>;
      for (int64_t row = begin; row < end; ++row) {
        T* out = at<T>(grad_z, row);
        const int64_t k = index[row - begin];
        if (k < 0) {
          fill_row(0.0, out, grad_z.channel_stride, channels);
          continue;
        }
        const T* x = at<T>(z, row);
        const T* incoming = at<T>(grad_quantized, row);
        const C* code = static_cast<const C*>(codebook.data) + k * codebook.channels;
        double poison = 0.0;  // x * 0 is NaN exactly where x is not finite
        for (int64_t d = 0; d < channels; ++d) {
          const double value = double(widen(x[d * z.channel_stride]));
          const double residual = value - double(widen(code[d]));
          poison += value * 0.0;
          narrow(double(widen(incoming[d * grad_quantized.channel_stride])) + scale * residual,
                 &out[d * grad_z.channel_stride]);
        }
        finite[row - begin] = poison == 0.0;
        if (!finite[row - begin]) fill_row(kNaN, out, grad_z.channel_stride, channels);
      }
    });
  });
}

}  // namespace vqkernels
