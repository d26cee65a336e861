#include "residual.h"

#include <math.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "rotation.h"

namespace vqkernels {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int kPartials = 8;  // independent sums of one row: their order is fixed, and they hide the latency of the add

double add_partials(const double* partial) {
  return ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
         ((partial[1] + partial[5]) + (partial[3] + partial[7]));
}

// Calls f with a null pointer of float or double.
template <class F> void with_real(DType type, F&& f) {
  if (type == DType::f64) f(static_cast<double*>(nullptr));
  else f(static_cast<float*>(nullptr));
}

// Calls f(i, d) for rows i in [0, count) and every channel, in the order in which rows with this channel stride lie.
template <class F> void walk(int64_t channel_stride, int64_t count, int64_t channels, const F& f) {
  if (channel_stride == 1) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < channels; ++d) f(i, d);
  } else {
    for (int64_t d = 0; d < channels; ++d)
      for (int64_t i = 0; i < count; ++i) f(i, d);
  }
}

// One element at one level. A float sum or difference that is computed in double and rounded is the float sum or
// difference: 53 bits are more than twice 24 and two, so the second rounding changes nothing.
template <class R, class S> double step(R* residual, S* sum, double code, bool first) {
  const double difference = double(*residual) - code;
  *residual = R(difference);
  *sum = first ? S(code) : S(double(*sum) + code);
  return difference * difference;
}

// One row at one level: residual and sum of codes go on; the squared error is returned.
template <class R, class S, class C>
double step_row(R* residual, S* sum, const C* code, int64_t channels, bool first) {
  double partial[kPartials] = {};
  int64_t d = 0;
  for (; d + kPartials <= channels; d += kPartials)
    for (int64_t i = 0; i < kPartials; ++i)
      partial[i] += step(&residual[d + i], &sum[d + i], double(widen(code[d + i])), first);
  for (int64_t i = 0; d + i < channels; ++i)
    partial[i] += step(&residual[d + i], &sum[d + i], double(widen(code[d + i])), first);
  return add_partials(partial);
}

template <class T> bool is_finite(const T* row, int64_t channels) {
  T poison = 0;  // x * 0 is NaN exactly where x is not finite
  for (int64_t d = 0; d < channels; ++d) poison += row[d] * T(0);
  return poison == T(0);
}

}  // namespace

void read_residuals(const Rows& z, int64_t begin, int64_t end, const int64_t* passed, void* residual) {
  const int64_t channels = z.channels;
  with_type(z.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    using R = typename Wide<T>::type;
    R* out = static_cast<R*>(residual);
    std::vector<const T*> from(end - begin, nullptr);
    for (int64_t row = begin; row < end; ++row)
      if (passed == nullptr || passed[row - begin] > 0) from[row - begin] = static_cast<const T*>(z.data) + z.offset(row);
    walk(z.channel_stride, end - begin, channels, [&](int64_t i, int64_t d) {
      out[i * channels + d] = from[i] == nullptr ? R(0) : R(widen(from[i][d * z.channel_stride]));
    });
  });
}

void subtract_codes(const Codes& codes, DType type, int64_t count, const int32_t* code, void* residual) {
  with_real(type, [&](auto* real) {
    using R = std::remove_pointer_t<decltype(real)>;
    with_type(codes.dtype, [&](auto* code_type) {
      using C = std::remove_const_t<std::remove_pointer_t<decltype(code_type)>>;
      for (int64_t i = 0; i < count; ++i) {
        if (code[i] < 0) continue;
        R* r = static_cast<R*>(residual) + i * codes.channels;
        const C* e = static_cast<const C*>(codes.data) + code[i] * codes.channels;
        for (int64_t d = 0; d < codes.channels; ++d) r[d] = R(double(r[d]) - double(widen(e[d])));
      }
    });
  });
}

ResidualSearch::ResidualSearch(const Rows& z, const std::vector<ResidualLevel>& levels, bool certified)
    : levels_(levels),
      residual_type_(residual_type(z.dtype)),
      sum_type_(sum_type(levels[0].codes.dtype)),
      residual_(kChunk * z.channels),
      sum_(kChunk * z.channels),
      view_{residual_.data(), residual_type_, 1, kChunk, z.channels, 0, z.channels, 1},
      found_(kChunk),
      finite_(new bool[kChunk]),
      kept_(new bool[kChunk]) {
  for (const ResidualLevel& level : levels)
    searches_.push_back(std::make_unique<NearestSearch>(view_, *level.packed, *level.integers, certified));
}

void ResidualSearch::operator()(const Rows& z, int64_t begin, int64_t end, const int64_t* passed,
                                const RowsOut& quantized, int64_t* index, double* error, int64_t stride, int32_t* code,
                                int64_t rows) {
  const int64_t count = end - begin, channels = z.channels, number = int64_t(levels_.size());
  read_residuals(z, begin, end, passed, residual_.data());
  for (int64_t q = 0; q < number; ++q) {
    for (int64_t i = 0; i < count; ++i) kept_[i] = passed == nullptr || passed[i] > q;
    (*searches_[q])(0, count, kept_.get(), found_.data(), finite_.get());
    const Codes& codes = levels_[q].codes;
    with_real(residual_type_, [&](auto* real) {
      using R = std::remove_pointer_t<decltype(real)>;
      with_real(sum_type_, [&](auto* sum) {
        using S = std::remove_pointer_t<decltype(sum)>;
        with_type(codes.dtype, [&](auto* code_type) {
          using C = std::remove_const_t<std::remove_pointer_t<decltype(code_type)>>;
          double total = 0.0;
          for (int64_t i = 0; i < count; ++i) {
            index[i * number + q] = found_[i];
            if (code != nullptr) code[q * rows + i] = kept_[i] && finite_[i] ? int32_t(found_[i]) : -1;
            if (kept_[i]) {
              const C* e = static_cast<const C*>(codes.data) + found_[i] * channels;
              const double square = step_row(reinterpret_cast<R*>(residual_.data()) + i * channels,
                                             reinterpret_cast<S*>(sum_.data()) + i * channels, e, channels, q == 0);
              total += finite_[i] ? square : kNaN;
            }
            if ((i + 1) % kBlock == 0 || i + 1 == count) error[q * stride + i / kBlock] = total, total = 0.0;
          }
        });
      });
    });
  }
  with_real(sum_type_, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* sum = reinterpret_cast<const S*>(sum_.data());
    with_type(z.dtype, [&](auto* z_type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(z_type)>>;
      std::vector<T*> to(count);
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T*>(quantized.data) + quantized.offset(begin + i);
      walk(quantized.channel_stride, count, channels, [&](int64_t i, int64_t d) {
        const bool none = passed != nullptr && passed[i] <= 0;
        narrow(none ? 0.0 : double(sum[i * channels + d]), to[i] + d * quantized.channel_stride);
      });
    });
  });
}

void residual_gradient_rows(const Rows& z, const std::vector<Codes>& levels, const Rows& grad_quantized,
                            Gradient gradient, const double* weight, const RowsOut& grad_z, int64_t begin, int64_t end,
                            const int64_t* index, int32_t* code, int64_t rows) {
  const int64_t channels = z.channels, count = end - begin, number = int64_t(levels.size());
  std::vector<double> residual(count * channels), sum(channels), total(count * channels, 0.0), row(channels);
  std::vector<int64_t> passed(count);
  std::vector<bool> good(count, true);
  for (int64_t i = 0; i < count; ++i) passed[i] = index[i * number] >= 0;
  read_residuals(z, begin, end, passed.data(), residual.data());
  with_real(residual_type(z.dtype), [&](auto* real) {
    using R = std::remove_pointer_t<decltype(real)>;
    with_real(sum_type(levels[0].dtype), [&](auto* sum_real) {
      using S = std::remove_pointer_t<decltype(sum_real)>;
      with_type(levels[0].dtype, [&](auto* code_type) {
        using C = std::remove_const_t<std::remove_pointer_t<decltype(code_type)>>;
        with_type(z.dtype, [&](auto* z_type) {
          using T = std::remove_const_t<std::remove_pointer_t<decltype(z_type)>>;
          walk(grad_quantized.channel_stride, count, channels, [&](int64_t i, int64_t d) {
            const T* g = static_cast<const T*>(grad_quantized.data) + grad_quantized.offset(begin + i);
            if (passed[i]) total[i * channels + d] = double(widen(g[d * grad_quantized.channel_stride]));
          });
          for (int64_t i = 0; i < count; ++i) {
            R* r = reinterpret_cast<R*>(residual.data()) + i * channels;
            double* out = &total[i * channels];
            const auto code_of = [&](int64_t q) {
              return static_cast<const C*>(levels[q].data) + index[i * number + q] * channels;
            };
            const auto passes = [&](int64_t q) { return q < number && index[i * number + q] >= 0; };
            if (gradient == Gradient::rotation && passed[i]) {
              std::vector<S> decoded(channels);
              for (int64_t q = 0; passes(q); ++q)
                for (int64_t d = 0; d < channels; ++d)
                  decoded[d] = q == 0 ? S(widen(code_of(q)[d])) : S(double(decoded[d]) + double(widen(code_of(q)[d])));
              for (int64_t d = 0; d < channels; ++d) row[d] = double(r[d]), sum[d] = double(decoded[d]);
              rotate_gradient(row.data(), sum.data(), out, channels);
            }
            int64_t q = 0;
            for (; passes(q); ++q) {
              const bool counts = is_finite(r, channels);
              good[i] = good[i] && counts;
              if (code != nullptr) code[q * rows + i] = counts ? int32_t(index[i * number + q]) : -1;
              const C* e = code_of(q);
              for (int64_t d = 0; d < channels; ++d) {
                const double difference = double(r[d]) - double(widen(e[d]));
                out[d] += weight[q] * difference;
                r[d] = R(difference);
              }
            }
            for (; code != nullptr && q < number; ++q) code[q * rows + i] = -1;
          }
          std::vector<T*> to(count);
          for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T*>(grad_z.data) + grad_z.offset(begin + i);
          walk(grad_z.channel_stride, count, channels, [&](int64_t i, int64_t d) {
            narrow(good[i] ? total[i * channels + d] : kNaN, to[i] + d * grad_z.channel_stride);
          });
        });
      });
    });
  });
}

}  // namespace vqkernels
