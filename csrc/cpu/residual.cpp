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

// The type that a null pointer of with_type or with_real points to.
template <class P> using Value = std::remove_const_t<std::remove_pointer_t<P>>;

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
template <class R, class S, class C> double step_row(R* residual, S* sum, const C* code, int64_t channels, bool first) {
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

template <class C> const C* code_at(const Codes& codes, int64_t index) {
  return static_cast<const C*>(codes.data) + index * codes.channels;
}

// What the search of one level has found for a chunk of rows.
struct Chunk {
  int64_t count, channels;
  const bool *kept, *finite;
  const int64_t* found;
  bool first;  // the level
};

// Every row of the chunk goes on by its code; error[block] is the squared error of each kBlock rows.
template <class R, class C>
void step_rows(const Chunk& chunk, const Codes& codes, void* residual, void* sum, double* error) {
  using S = typename Wide<C>::type;
  const int64_t channels = chunk.channels;
  double total = 0.0;
  for (int64_t i = 0; i < chunk.count; ++i) {
    if (chunk.kept[i]) {
      const double square = step_row(static_cast<R*>(residual) + i * channels, static_cast<S*>(sum) + i * channels,
                                     code_at<C>(codes, chunk.found[i]), channels, chunk.first);
      total += chunk.finite[i] ? square : kNaN;
    }
    if ((i + 1) % kBlock == 0 || i + 1 == chunk.count) error[i / kBlock] = total, total = 0.0;
  }
}

// The codes of one row: index[q] of every level that it passes.
struct Path {
  const std::vector<Codes>& levels;
  const int64_t* index;
  int64_t passed;
};

int64_t levels_passed(const int64_t* index, int64_t number) {
  return std::find_if(index, index + number, [](int64_t k) { return k < 0; }) - index;
}

// sum <- the row's codes in level order, in the type of sums.
template <class C> void add_codes(const Path& path, double* sum) {
  using S = typename Wide<C>::type;
  for (int64_t q = 0; q < path.passed; ++q) {
    const C* code = code_at<C>(path.levels[q], path.index[q]);
    for (int64_t d = 0; d < path.levels[q].channels; ++d) {
      const double e = double(widen(code[d]));
      sum[d] = double(q == 0 ? S(e) : S(sum[d] + e));
    }
  }
}

// gradient <- gradient + weight[q] (r_q - e_q) over the levels that a row passes; r is r_0, and ends as what is left.
// Writes, unless null, the code that counts at each level, code[q * rows]. Returns whether the row is finite at each of
// them.
template <class C, class R>
bool add_steps(const Path& path, const double* weight, R* r, double* gradient, int32_t* code, int64_t rows) {
  bool good = true;
  for (int64_t q = 0; q < path.passed; ++q) {
    const int64_t channels = path.levels[q].channels;
    const bool counts = is_finite(r, channels);
    good = good && counts;
    if (code != nullptr) code[q * rows] = counts ? int32_t(path.index[q]) : -1;
    const C* e = code_at<C>(path.levels[q], path.index[q]);
    for (int64_t d = 0; d < channels; ++d) {
      const double difference = double(r[d]) - double(widen(e[d]));
      gradient[d] += weight[q] * difference;
      r[d] = R(difference);
    }
  }
  return good;
}

}  // namespace

void read_residuals(const Rows& z, int64_t begin, int64_t end, const int64_t* passed, void* residual) {
  const int64_t channels = z.channels;
  with_type(z.dtype, [&](auto* type) {
    using T = Value<decltype(type)>;
    using R = typename Wide<T>::type;
    R* out = static_cast<R*>(residual);
    std::vector<const T*> from(end - begin, nullptr);
    for (int64_t row = begin; row < end; ++row)
      if (passed == nullptr || passed[row - begin] > 0)
        from[row - begin] = static_cast<const T*>(z.data) + z.offset(row);
    walk(z.channel_stride, end - begin, channels, [&](int64_t i, int64_t d) {
      out[i * channels + d] = from[i] == nullptr ? R(0) : R(widen(from[i][d * z.channel_stride]));
    });
  });
}

void subtract_codes(const Codes& codes, DType type, int64_t count, const int32_t* code, void* residual) {
  with_real(type, [&](auto* real) {
    using R = Value<decltype(real)>;
    with_type(codes.dtype, [&](auto* code_type) {
      using C = Value<decltype(code_type)>;
      for (int64_t i = 0; i < count; ++i) {
        if (code[i] < 0) continue;
        R* r = static_cast<R*>(residual) + i * codes.channels;
        const C* e = code_at<C>(codes, code[i]);
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
    const Chunk chunk{count, channels, kept_.get(), finite_.get(), found_.data(), q == 0};
    with_real(residual_type_, [&](auto* real) {
      with_type(codes.dtype, [&](auto* code_type) {
        step_rows<Value<decltype(real)>, Value<decltype(code_type)>>(chunk, codes, residual_.data(), sum_.data(),
                                                                     error + q * stride);
      });
    });
    for (int64_t i = 0; i < count; ++i) {
      index[i * number + q] = found_[i];
      if (code != nullptr) code[q * rows + i] = kept_[i] && finite_[i] ? int32_t(found_[i]) : -1;
    }
  }
  with_real(sum_type_, [&](auto* type) {
    using S = Value<decltype(type)>;
    const S* sum = reinterpret_cast<const S*>(sum_.data());
    with_type(z.dtype, [&](auto* z_type) {
      using T = Value<decltype(z_type)>;
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
  std::vector<char> good(count, true);
  for (int64_t i = 0; i < count; ++i) passed[i] = levels_passed(index + i * number, number);
  read_residuals(z, begin, end, passed.data(), residual.data());
  with_type(z.dtype, [&](auto* z_type) {
    using T = Value<decltype(z_type)>;
    walk(grad_quantized.channel_stride, count, channels, [&](int64_t i, int64_t d) {
      const T* g = static_cast<const T*>(grad_quantized.data) + grad_quantized.offset(begin + i);
      if (passed[i] > 0) total[i * channels + d] = double(widen(g[d * grad_quantized.channel_stride]));
    });
  });
  with_real(residual_type(z.dtype), [&](auto* real) {
    using R = Value<decltype(real)>;
    with_type(levels[0].dtype, [&](auto* code_type) {
      using C = Value<decltype(code_type)>;
      for (int64_t i = 0; i < count; ++i) {
        const Path path{levels, index + i * number, passed[i]};
        R* r = reinterpret_cast<R*>(residual.data()) + i * channels;
        if (gradient == Gradient::rotation && passed[i] > 0) {
          std::copy_n(r, channels, row.begin());
          add_codes<C>(path, sum.data());
          rotate_gradient(row.data(), sum.data(), &total[i * channels], channels);
        }
        good[i] = add_steps<C>(path, weight, r, &total[i * channels], code == nullptr ? nullptr : code + i, rows);
        for (int64_t q = passed[i]; code != nullptr && q < number; ++q) code[q * rows + i] = -1;
      }
    });
  });
  with_type(z.dtype, [&](auto* z_type) {
    using T = Value<decltype(z_type)>;
    std::vector<T*> to(count);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T*>(grad_z.data) + grad_z.offset(begin + i);
    walk(grad_z.channel_stride, count, channels, [&](int64_t i, int64_t d) {
      narrow(good[i] ? total[i * channels + d] : kNaN, to[i] + d * grad_z.channel_stride);
    });
  });
}

}  // namespace vqkernels
