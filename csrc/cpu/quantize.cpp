#include "quantize.h"

#include <math.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "rotation.h"

namespace vqkernels {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int kPartials = 8;  // independent sums of one row: their order is fixed, and they hide the latency of the add

template <class T> T* at(const RowsOut& out, int64_t row) { return static_cast<T*>(out.data) + out.offset(row); }

template <class T> const T* at(const Rows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + rows.offset(row);
}

// The partial sums of one row, added pairwise.
double add_partials(const double* partial) {
  return ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
         ((partial[1] + partial[5]) + (partial[3] + partial[7]));
}

// One element: writes the code, returns the squared residual.
template <class T, class C> double gather_element(T z, C code, T* out) {
  const double e = double(widen(code)), residual = double(widen(z)) - e;
  narrow(e, out);
  return residual * residual;
}

// Squared error of one contiguous row: channel d goes to partial sum d mod 8.
template <class T, class C> double gather_row(const T* z, const C* code, T* out, int64_t channels) {
  double partial[kPartials] = {};
  int64_t d = 0;
  for (; d + kPartials <= channels; d += kPartials)
    for (int64_t i = 0; i < kPartials; ++i) partial[i] += gather_element(z[d + i], code[d + i], &out[d + i]);
  for (int64_t i = 0; d + i < channels; ++i) partial[i] += gather_element(z[d + i], code[d + i], &out[d + i]);
  return add_partials(partial);
}

template <class T, class C> void copy_row(const C* code, T* out, int64_t stride, int64_t channels) {
  for (int64_t d = 0; d < channels; ++d) narrow(double(widen(code[d])), &out[d * stride]);
}

template <class T> void fill_row(double value, T* out, int64_t stride, int64_t channels) {
  for (int64_t d = 0; d < channels; ++d) narrow(value, &out[d * stride]);
}

// Calls f(i, d) for rows i in [first, last) and every channel, in the order in which z lies: where channels are apart,
// neighbouring rows share cache lines and channels do not.
template <class F> void walk(const Rows& z, int64_t first, int64_t last, const F& f) {
  if (z.channel_stride == 1) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t d = 0; d < z.channels; ++d) f(i, d);
  } else {
    for (int64_t d = 0; d < z.channels; ++d)
      for (int64_t i = first; i < last; ++i) f(i, d);
  }
}

}  // namespace

double gather_rows(const Rows& z, const Codes& codebook, const RowsOut& quantized, int64_t begin, int64_t end,
                   const int64_t* index, const bool* finite) {
  const int64_t channels = z.channels, count = end - begin;
  double total = 0.0;
  with_type(z.dtype, [&](auto* z_type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(z_type)>>;
    with_type(codebook.dtype, [&](auto* code_type) {
      using C = std::remove_const_t<std::remove_pointer_t<decltype(code_type)>>;
      const auto code_of = [&](int64_t i) { return static_cast<const C*>(codebook.data) + index[i] * channels; };
      if (z.channel_stride == 1 && quantized.channel_stride == 1) {
        for (int64_t i = 0; i < count; ++i) {
          T* out = at<T>(quantized, begin + i);
          if (index[i] < 0) fill_row(0.0, out, 1, channels);
          else if (!finite[i]) copy_row(code_of(i), out, 1, channels), total = kNaN;
          else total += gather_row(at<T>(z, begin + i), code_of(i), out, channels);
        }
        return;
      }
      // Channels are apart: they are walked in the outer loop, because neighbouring rows share cache lines.
      std::vector<const T*> from(count);
      std::vector<T*> to(count);
      std::vector<double> partial(count * kPartials, 0.0);
      for (int64_t i = 0; i < count; ++i) from[i] = at<T>(z, begin + i), to[i] = at<T>(quantized, begin + i);
      for (int64_t d = 0; d < channels; ++d) {
        for (int64_t i = 0; i < count; ++i) {
          T* out = to[i] + d * quantized.channel_stride;
          if (index[i] < 0) narrow(0.0, out);
          else if (!finite[i]) narrow(double(widen(code_of(i)[d])), out);
          else
            partial[i * kPartials + d % kPartials] += gather_element(from[i][d * z.channel_stride], code_of(i)[d], out);
        }
      }
      for (int64_t i = 0; i < count; ++i)
        total += index[i] >= 0 && !finite[i] ? kNaN : add_partials(&partial[i * kPartials]);
    });
  });
  return total;
}

void mark_finite(const Rows& z, int64_t begin, int64_t end, const int64_t* index, bool* finite) {
  std::vector<double> poison(end - begin, 0.0);  // x * 0 is NaN exactly where x is not finite
  with_type(z.dtype, [&](auto* z_type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(z_type)>>;
    walk(z, 0, end - begin, [&](int64_t i, int64_t d) {
      if (index[i] >= 0) poison[i] += double(widen(at<T>(z, begin + i)[d * z.channel_stride])) * 0.0;
    });
  });
  for (int64_t i = 0; i < end - begin; ++i) finite[i] = poison[i] == 0.0;
}

void gradient_rows(const Rows& z, const Codes& codebook, const Rows& grad_quantized, Gradient gradient, double scale,
                   const RowsOut& grad_z, int64_t begin, int64_t end, const int64_t* index, bool* finite) {
  const int64_t channels = z.channels, count = end - begin;
  with_type(z.dtype, [&](auto* z_type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(z_type)>>;
    with_type(codebook.dtype, [&](auto* code_type) {
      using C = std::remove_const_t<std::remove_pointer_t<decltype(code_type)>>;
      std::vector<double> poison(count, 0.0);  // x * 0 is NaN exactly where x is not finite
      std::vector<const T*> from(count), incoming(count);
      std::vector<T*> to(count);
      for (int64_t i = 0; i < count; ++i) {
        from[i] = at<T>(z, begin + i);
        incoming[i] = at<T>(grad_quantized, begin + i);
        to[i] = at<T>(grad_z, begin + i);
      }
      const auto value = [&](int64_t i, int64_t d) { return double(widen(from[i][d * z.channel_stride])); };
      const auto code = [&](int64_t i, int64_t d) {
        return double(widen(static_cast<const C*>(codebook.data)[index[i] * channels + d]));
      };
      const auto through = [&](int64_t i, int64_t d) {
        return double(widen(incoming[i][d * grad_quantized.channel_stride]));
      };
      const auto finish = [&](int64_t i, int64_t d, double g) {
        const double x = value(i, d);
        poison[i] += x * 0.0;
        narrow(g + scale * (x - code(i, d)), to[i] + d * grad_z.channel_stride);
      };
      if (gradient == Gradient::straight_through) {
        walk(z, 0, count, [&](int64_t i, int64_t d) {
          if (index[i] < 0) narrow(0.0, to[i] + d * grad_z.channel_stride);
          else finish(i, d, through(i, d));
        });
      } else {
        constexpr int64_t kTogether = 16;  // rows whose copies in double lie in cache
        std::vector<double> rows(kTogether * channels), codes(channels), turned(kTogether * channels);
        for (int64_t first = 0; first < count; first += kTogether) {
          const int64_t last = std::min(first + kTogether, count);
          walk(z, first, last, [&](int64_t i, int64_t d) {
            if (index[i] < 0) return;
            rows[(i - first) * channels + d] = value(i, d);
            turned[(i - first) * channels + d] = through(i, d);
          });
          for (int64_t i = first; i < last; ++i) {
            if (index[i] < 0) continue;
            for (int64_t d = 0; d < channels; ++d) codes[d] = code(i, d);
            rotate_gradient(&rows[(i - first) * channels], codes.data(), &turned[(i - first) * channels], channels);
          }
          walk(z, first, last, [&](int64_t i, int64_t d) {
            if (index[i] < 0) narrow(0.0, to[i] + d * grad_z.channel_stride);
            else finish(i, d, turned[(i - first) * channels + d]);
          });
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        if (index[i] < 0) continue;
        finite[i] = poison[i] == 0.0;
        if (!finite[i]) fill_row(kNaN, to[i], grad_z.channel_stride, channels);
      }
    });
  });
}

}  // namespace vqkernels
