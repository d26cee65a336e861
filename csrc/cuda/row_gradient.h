// The gradient of z as a block program: grad_z = g + grad * 2 (z - e) / elements, from the direct residual.
//
// g is the gradient of the quantized rows, or, with `rotate`, |e|/|z| (g - 2 (g.w) w + 2 (g.q) u) with u = z/|z|, q =
// e/|e|, w = (u + q)/|u + q|, w = 0 where u and q are opposite (Fifty et al. 2024; specified by `rotate` of
// vqkernels/reference.py). Where channels are neighbours in memory, neighbouring threads share a row; else they take
// neighbouring rows. Never materialised: e[index], z - e. Traffic: z, g and the chosen codes (mostly from cache) once,
// then again from cache: whether a row is poisoned is known before its gradient is written.
// A masked row (index -1) is not read and gets 0; a poisoned one, or one whose index is not below the codebook's size,
// NaN.
#pragma once
#include <math.h>

#include <type_traits>

#include "rows.h"

namespace vqkernels {
namespace cuda {

constexpr int kGradientThreads = 128;
constexpr double kOpposite = 0x1p-52;  // |u + q|^2 at or below which u and q are opposite to within rounding

struct RowGradient {
  Rows z;
  Codes codebook;
  PerRow indices;  // int64
  int64_t codes;
  Rows incoming, out;  // of z's sizes and dtype
  const void* grad;    // of the commitment loss, 0-d
  DType grad_type;
  const int64_t* elements;  // 0-d
  int rotate;
  int lanes;  // threads of a row, see gradient_lanes
};

VQ_BOTH int gradient_lanes(const Rows& z) {
  if (z.channel_stride != 1) return 1;
  int lanes = 1;
  while (lanes < kWarp && lanes < z.channels) lanes *= 2;
  return lanes;
}

VQ_BOTH double two_to(int exponent) {  // a normal number
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

// The exponent that scales x > 0 to at least 1/2 and below 2, within what two_to can undo; subnormal numbers stay
// small.
VQ_BOTH int scale_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  const int exponent = int(bits >> 52 & 2047) - 1023;
  return exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent;
}

// One row as its threads see it: every `lanes`-th channel.
template <class Z> struct GradientRow {
  const Z *z, *incoming;
  const void* code;
  DType code_type;
  int64_t code_at, code_stride, z_stride, incoming_stride, channels;
  int lane, lanes;

  template <class Real> VQ_BOTH Real x(int64_t d) const { return Real(widen(z[d * z_stride])); }
  template <class Real> VQ_BOTH Real g(int64_t d) const { return Real(widen(incoming[d * incoming_stride])); }
  template <class Real> VQ_BOTH Real e(int64_t d) const {
    const int64_t at = code_at + d * code_stride;
    if constexpr (sizeof(Real) == 8) return load_double(code, code_type, at);
    else if (code_type == DType::f32) return static_cast<const float*>(code)[at];  // double is slow on many GPUs
    else if (code_type == DType::bf16) return widen(static_cast<const BFloat16*>(code)[at]);
    else return widen(static_cast<const Float16*>(code)[at]);
  }
};

// What rotation needs of a row: u = to_u z, q = to_q e; not directed where z or e is zero.
struct Rotation {
  double to_u, to_q, ratio, along_s, along_q;
  bool directed;
};

template <class Block> VQ_BOTH double add_lanes(Block& block, double x, int lanes) {
  for (int other = 1; other < lanes; other *= 2) x += block.shuffle_xor(x, other);
  return x;
}

template <class Block> VQ_BOTH double largest_of_lanes(Block& block, double x, int lanes) {
  for (int other = 1; other < lanes; other *= 2) {
    const double that = block.shuffle_xor(x, other);
    x = that > x ? that : x;
  }
  return x;
}

// Every thread of the warp takes part; `live` says whether its row is read.
template <class Z, class Block> VQ_BOTH Rotation rotation_of(Block& block, const GradientRow<Z>& row, bool live) {
  const int64_t end = live ? row.channels : 0;
  double z_most = 0.0, e_most = 0.0;
  for (int64_t d = row.lane; d < end; d += row.lanes) {
    const double x = row.template x<double>(d), e = row.template e<double>(d);
    z_most = (x < 0 ? -x : x) > z_most ? (x < 0 ? -x : x) : z_most;
    e_most = (e < 0 ? -e : e) > e_most ? (e < 0 ? -e : e) : e_most;
  }
  const int z_exponent = scale_of(largest_of_lanes(block, z_most, row.lanes));
  const int e_exponent = scale_of(largest_of_lanes(block, e_most, row.lanes));
  const double z_scale = two_to(-z_exponent), e_scale = two_to(-e_exponent);
  double z_square = 0.0, e_square = 0.0;
  for (int64_t d = row.lane; d < end; d += row.lanes) {
    const double x = row.template x<double>(d) * z_scale, e = row.template e<double>(d) * e_scale;
    z_square += x * x, e_square += e * e;
  }
  z_square = add_lanes(block, z_square, row.lanes), e_square = add_lanes(block, e_square, row.lanes);
  Rotation found = {};
  found.directed = z_square > 0.0 && e_square > 0.0;
  const double z_norm = found.directed ? sqrt(z_square) : 1.0, e_norm = found.directed ? sqrt(e_square) : 1.0;
  found.to_u = z_scale / z_norm, found.to_q = e_scale / e_norm;
  double square = 0.0, along_s = 0.0, along_q = 0.0;
  for (int64_t d = row.lane; d < end; d += row.lanes) {
    const double q = row.template e<double>(d) * found.to_q, s = row.template x<double>(d) * found.to_u + q;
    const double g = row.template g<double>(d);
    square += s * s, along_s += g * s, along_q += g * q;
  }
  square = add_lanes(block, square, row.lanes);
  along_s = add_lanes(block, along_s, row.lanes);
  found.along_q = 2.0 * add_lanes(block, along_q, row.lanes);
  found.along_s = square > kOpposite ? 2.0 * along_s / square : 0.0;
  // In two factors, each a normal number; an infinite ratio would turn a zero into NaN.
  const int exponent = e_exponent - z_exponent, half = exponent / 2;
  const double ratio = e_norm / z_norm * two_to(half) * two_to(exponent - half);
  found.ratio = ratio < 1.7976931348623157e308 ? ratio : 1.7976931348623157e308;
  return found;
}

// Real: double where an input is, or with rotation, else float.
template <class Z, class Real, bool kRotate, class Block>
VQ_BOTH void write_row_gradients(Block& block, const RowGradient& a) {
  const int lanes = a.lanes;
  const int64_t flat = block.index() * (block.threads() / lanes) + block.thread() / lanes;
  const bool inside = flat < a.z.total();
  const Place place = inside ? place_of(a.z, uint32_t(flat)) : Place{0, 0, 0};
  const int64_t index = inside ? static_cast<const int64_t*>(a.indices.data)[offset_of(a.indices, place)] : -1;
  const bool known = index >= 0 && index < a.codes;
  const GradientRow<Z> row = {static_cast<const Z*>(a.z.data) + offset_of(a.z, place),
                              static_cast<const Z*>(a.incoming.data) + offset_of(a.incoming, place),
                              a.codebook.data,
                              a.codebook.dtype,
                              place.head * a.codebook.head_stride + (known ? index : 0) * a.codebook.code_stride,
                              a.codebook.channel_stride,
                              a.z.channel_stride,
                              a.incoming.channel_stride,
                              a.z.channels,
                              block.thread() % lanes,
                              lanes};
  int bad = index >= a.codes;
  for (int64_t d = row.lane; known && d < row.channels; d += lanes) bad |= !is_finite(widen(row.z[d * row.z_stride]));
  for (int other = 1; other < lanes; other *= 2) bad |= block.shuffle_xor(bad, other);
  Rotation turn = {};
  if constexpr (kRotate) turn = rotation_of(block, row, known && !bad);
  if (!inside) return;

  const Real factor = Real(2.0 * load_double(a.grad, a.grad_type, 0) / double(*a.elements));
  Z* out = static_cast<Z*>(const_cast<void*>(a.out.data)) + offset_of(a.out, place);
  for (int64_t d = row.lane; d < row.channels; d += lanes) {
    double gradient = 0.0;
    if (bad) {
      gradient = double(NAN);
    } else if (known) {
      const Real x = row.template x<Real>(d), e = row.template e<Real>(d);
      Real through = row.template g<Real>(d);
      if constexpr (kRotate) {
        const double u = x * turn.to_u, s = u + e * turn.to_q;
        if (turn.directed) through = turn.ratio * (through - turn.along_s * s + turn.along_q * u);
      }
      gradient = double(through + factor * (x - e));
    }
    narrow(gradient, out + d * a.out.channel_stride);
  }
}

template <class Z, class Real, bool kRotate> struct WriteRowGradients {
  static constexpr int kThreads = kGradientThreads, kBlocks = 8;
  RowGradient a;
  template <class Block> VQ_BOTH void operator()(Block& block) const {
    write_row_gradients<Z, Real, kRotate>(block, a);
  }
};

// One launch; `Launcher` as in segment_sums.h.
template <class Launcher> int launch_row_gradients(Launcher& launcher, const RowGradient& given) {
  if (given.z.total() == 0 || given.z.channels == 0) return 0;
  RowGradient a = given;
  a.lanes = gradient_lanes(a.z);
  const int64_t blocks = blocks_of(a.z.total(), kGradientThreads / a.lanes);
  return with_type(a.z.dtype, [&](auto* type) {
    using Z = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const bool wide = a.z.dtype == DType::f64 || a.codebook.dtype == DType::f64;
    return a.rotate ? launcher.launch(blocks, 1, 0, WriteRowGradients<Z, double, true>{a})
           : wide   ? launcher.launch(blocks, 1, 0, WriteRowGradients<Z, double, false>{a})
                    : launcher.launch(blocks, 1, 0, WriteRowGradients<Z, float, false>{a});
  });
}

}  // namespace cuda
}  // namespace vqkernels
