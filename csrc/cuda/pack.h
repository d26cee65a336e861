// Rounding codes and rows to fp16 operands, in one launch: blocks for the codes of a head, then blocks for its rows.
//
// No block waits for another: what they must agree on, the frame, each works out from the same sample of at most 64
// codes. Code units are 2^c (x - centre). The centre is the mean of the sampled codes that are not far longer than
// most, taken twice; any vector is valid, since rows and codes subtract the same one and the rounding is measured. c
// brings the sample's reference length (seven of eight are no longer) into [2^8, 2^9). Cosine packs 2^10 e / |e| and
// centres nothing. A row is stored as q = fp16(2^r (z - centre)) with its largest element in [2^10, 2^11); beta = 2^(c
// - r) takes q to code units. Results per row, in code units: norm >= |beta q|, error >= |beta q - 2^c (z - centre)|;
// NaN as norm marks a row with a NaN or an infinity, -1 a masked row (never read), an infinite error one about which
// nothing can be proved.
//
// Codes left out (euclidean). A code of length >= 2^13 code units, 16 times the reference, would set radius and spread
// of all. It is packed as zero with half norm ¼|y|², rounded down: a lower bound of ½|y|² - x·y for every x no longer
// than 2^11, since then x·y <= 2^11 |y| <= ¼|y|²; margin.h holds for lower bounds. resolve.h leaves longer rows
// undecided. It is never the best: its score is nearly 2^24 or more, that of a sampled code at most 2^17 + 2^11 · 2^9
// and its rounding. A code with a NaN or an infinity has half norm +inf, as padding has. The contract takes the first
// of equal codes, and no score tells them apart: a row whose nearest code is repeated goes to float64.
#pragma once
#include "problem.h"

namespace vqkernels {
namespace cuda {

constexpr int kSample = 64;
constexpr double kLeftOut = 0x1p26;     // squared length of codes that are left out
constexpr float kNearRows = 0x1p11f;    // the longest rows for which their half norms are bounds
constexpr float kNearScores = 0x1p23f;  // the scores of others are below

VQ_BOTH constexpr int pack_shared_bytes(int padded) { return padded * 4 + kSample * 8 + 8 + 8 * 12; }

// fp16 nearest to x, which must be finite.
VQ_BOTH uint16_t half_bits(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  Float16 narrowed;
  narrow(double(x), &narrowed);
  return narrowed.bits;
#endif
}

VQ_BOTH void put(Chunk& chunk, int i, uint16_t bits) {
  if (i % 2 == 0) chunk.word[i / 2] = bits;
  else chunk.word[i / 2] |= uint32_t(bits) << 16;
}

struct Frame {
  int exponent;   // c
  bool provable;  // false: codes beyond the range of the arithmetic
};

// Writes the centre to shared memory (byte 0 on, one float per padded channel) and returns the rest of the frame.
template <class Block> VQ_BOTH Frame frame_of(Block& block, const Call& call, int64_t head) {
  const Problem& p = call.problem;
  const int padded = call.plan.padded, thread = block.thread(), threads = block.threads();
  const auto centre = block.template shared<float>(0);
  const auto length = block.template shared<double>(padded * 4);  // of each sampled code; -1 where it is not finite
  const auto reference = block.template shared<double>(padded * 4 + kSample * 8);
  const int samples = int(p.codes < kSample ? p.codes : kSample);
  const auto sampled = [&](int s, int64_t d) {
    const int64_t row = int64_t(s) * p.codes / samples;
    return element<double>(
        p.codebook.data, p.codebook.dtype,
        head * p.codebook.head_stride + row * p.codebook.code_stride + d * p.codebook.channel_stride);
  };
  for (int d = thread; d < padded; d += threads) centre.set(d, 0.0f);
  block.sync();
  if (p.metric == Metric::cosine) return {10, true};
  for (int round = call.plan.centred ? 2 : 0;; --round) {
    for (int s = thread / kWarp; s < kSample; s += threads / kWarp) {
      double square = 0.0;
      for (int d = thread % kWarp; s < samples && d < p.z.channels; d += kWarp) {
        const double x = sampled(s, d) - double(centre.get(d));
        square += x * x;
      }
      square = sum_of_lanes(block, square, kWarp);
      if (thread % kWarp == 0) length.set(s, s < samples && square < INFINITY ? sqrt(square) : -1.0);
    }
    block.sync();
    if (thread < kSample) {  // the one with an eighth of the finite ones above it
      const double mine = length.get(thread);
      int finite = 0, above = 0;
      for (int s = 0; s < kSample; ++s) {
        const double other = length.get(s);
        finite += other >= 0.0;
        above += other >= 0.0 && (other > mine || (other == mine && s < thread));
      }
      if (mine >= 0.0 && above == finite / 8) reference.set(0, mine);
      if (thread == 0 && finite == 0) reference.set(0, 0.0);
    }
    block.sync();
    const double most = reference.get(0);
    if (round == 0) {
      const int exponent = most > 0.0 ? binary_exponent(most) : 8;
      return {8 - exponent, exponent > -110 && exponent < 100};
    }
    for (int d = thread; d < p.z.channels; d += threads) {
      double total = 0.0;
      int count = 0;
      for (int s = 0; s < samples; ++s) {
        const double x = length.get(s);
        if (x < 0.0 || x > 4.0 * most) continue;
        total += sampled(s, d);
        ++count;
      }
      const double mean = count > 0 ? total / count : 0.0;
      centre.set(d, fabs(mean) < 1e37 ? float(mean) : 0.0f);
    }
    block.sync();
  }
}

// Codes part · 32 ..., 32 at a time, eight lanes each.
template <class Block>
VQ_BOTH void pack_codes(Block& block, const Call& call, const Frame& frame, int64_t head, int part) {
  const Problem& p = call.problem;
  const Operands& o = call.operands;
  const int padded = call.plan.padded, thread = block.thread(), sub = thread % kPackLanes;
  const auto centre = block.template shared<float>(0);
  constexpr int kTogether = kPackThreads / kPackLanes;
  const bool cosine = p.metric == Metric::cosine, euclidean = p.metric == Metric::euclidean;
  const double scale = power_of_two<double>(frame.provable ? frame.exponent : 0);
  float radius = 0.0f, spread = 0.0f;
  int any_left_out = 0;
  for (int first = part * kTogether; first < call.plan.padded_codes; first += call.plan.code_parts * kTogether) {
    const int k = first + thread / kPackLanes;
    const int64_t from = head * p.codebook.head_stride + k * p.codebook.code_stride;
    const auto code = [&](int64_t d) {
      return element<double>(p.codebook.data, p.codebook.dtype, from + d * p.codebook.channel_stride);
    };
    int bad = k >= p.codes;
    double square = 0.0, whole = 0.0;
    for (int d = sub; k < p.codes && d < p.z.channels; d += kPackLanes) {
      const double e = code(d), y = (e - double(centre.get(d))) * scale;
      bad |= !is_finite(e);
      square += e * e;
      whole += y * y;
    }
    bad = sum_of_lanes(block, bad, kPackLanes);
    square = sum_of_lanes(block, square, kPackLanes);
    whole = sum_of_lanes(block, whole, kPackLanes);
    const bool finite = bad == 0;
    // squares that leave float64's range make the contract's own norm coarse
    const bool vague = cosine ? square != 0.0 && !(square > 0x1p-900 && square < 0x1p900)
                              : !frame.provable || (!euclidean && !(whole < 0x1p30));
    const bool left_out = finite && !vague && euclidean && !(whole < kLeftOut);
    const bool kept = finite && !vague && !left_out;
    const double divisor = cosine && square > 0.0 ? sqrt(square) : 1.0;
    double squares = 0.0, residual = 0.0;
    Chunk* out = reinterpret_cast<Chunk*>(o.codes + (head * call.plan.padded_codes + k) * padded);
    for (int c = sub; c < padded / kChunkNumbers; c += kPackLanes) {
      Chunk chunk = {};
      for (int i = 0; i < kChunkNumbers; ++i) {
        const int d = c * kChunkNumbers + i;
        const double y = kept && d < p.z.channels ? (code(d) - double(centre.get(d))) / divisor * scale : 0.0;
        const uint16_t bits = half_bits(float(y));
        const double rounded = double(widen(Float16{bits}));
        put(chunk, i, bits);
        squares += rounded * rounded;
        residual += (y - rounded) * (y - rounded);
      }
      out[c] = chunk;
    }
    squares = sum_of_lanes(block, squares, kPackLanes);
    residual = sum_of_lanes(block, residual, kPackLanes);
    if (sub == 0) {
      const double bound = 0.25 * whole * (1.0 - 0x1p-20);
      const double half = !euclidean ? 0.0 : left_out ? (bound < 1e38 ? bound : 1e38) : 0.5 * squares;
      o.half_norms[head * call.plan.padded_codes + k] = finite ? float(half) : INFINITY;
    }
    constexpr double kUp = 1.0 + 0x1p-20;  // covers float64 arithmetic and the conversion to fp32
    radius = fmaxf(radius, finite && vague ? INFINITY : float(sqrt(squares) * kUp));
    spread = fmaxf(spread, float(sqrt(residual) * kUp));
    any_left_out |= left_out;
  }
  const auto most = block.template shared<float>(padded * 4 + kSample * 8 + 8);
  radius = most_of_lanes(block, radius, kWarp);
  spread = most_of_lanes(block, spread, kWarp);
  const float left = most_of_lanes(block, float(any_left_out), kWarp);
  const int warp = thread / kWarp;
  if (thread % kWarp == 0) most.set(3 * warp, radius), most.set(3 * warp + 1, spread), most.set(3 * warp + 2, left);
  block.sync();
  if (thread == 0) {
    float highest[3] = {};
    for (int w = 0; w < kPackThreads / kWarp; ++w)
      for (int i = 0; i < 3; ++i) highest[i] = fmaxf(highest[i], most.get(3 * w + i));
    const int64_t at = head * call.plan.code_parts + part;
    o.radius[at] = highest[0];
    o.spread[at] = highest[1];
    o.left_out[at] = highest[2] > 0.0f;
  }
}

template <class Real, class Block>
VQ_BOTH void pack_rows(Block& block, const Call& call, const Frame& frame, int64_t head, int part) {
  const Problem& p = call.problem;
  const Operands& o = call.operands;
  const int padded = call.plan.padded, lanes = call.plan.row_lanes, sub = block.thread() % lanes;
  const int together = kPackThreads / lanes;
  const auto centre = block.template shared<float>(0);
  for (int first = part * together; first < call.plan.padded_rows; first += call.plan.row_parts * together) {
    const int row = first + block.thread() / lanes;
    const bool inside = row < call.plan.padded_rows, live = is_live(call, head, row);
    const int64_t from = live ? row_offset(p, p.z, head, row) : 0;
    const auto value = [&](int d) { return element<Real>(p.z.data, p.z.dtype, from + d * p.z.channel_stride); };
    Real largest = 0;
    int bad = 0;
    for (int c = sub; live && c < padded / kChunkNumbers; c += lanes)
      for (int i = 0; i < kChunkNumbers; ++i) {
        const int d = c * kChunkNumbers + i;
        if (d >= p.z.channels) break;
        const Real z = value(d);
        const Real x = z - Real(centre.get(d)), size = x < 0 ? -x : x;
        if (!(z - z == 0)) bad = 1;  // of a NaN or an infinity that is NaN
        else if (size > largest) largest = size;
      }
    largest = most_of_lanes(block, largest, lanes);
    bad = sum_of_lanes(block, bad, lanes);

    int exponent = binary_exponent(largest);
    bool fits = live && bad == 0 && exponent < 120 && frame.provable;
    // at least -116, so that the scale stays a normal fp32 number; smaller rows just use fewer bits
    exponent = exponent < -116 ? -116 : exponent > 120 ? 120 : exponent;
    const Real scale = power_of_two<Real>(10 - exponent);
    int shift = frame.exponent + exponent - 10;
    fits = fits && shift < 40;
    // below 2^-126 the row is nothing beside the codes; the flat 2^-40 of the certificate covers the difference
    shift = shift < -126 ? -126 : shift > 40 ? 40 : shift;
    const float beta = fits ? power_of_two<float>(shift) : 0.0f;
    float squares = 0.0f, residual = 0.0f;
    Chunk* out = reinterpret_cast<Chunk*>(o.rows + (head * call.plan.padded_rows + row) * padded);
    for (int c = sub; inside && c < padded / kChunkNumbers; c += lanes) {
      Chunk chunk = {};
      for (int i = 0; i < kChunkNumbers; ++i) {
        const int d = c * kChunkNumbers + i;
        const float x = fits && d < p.z.channels ? float((value(d) - Real(centre.get(d))) * scale) : 0.0f;
        const uint16_t bits = half_bits(x);
        const float rounded = widen(Float16{bits}), left = x - rounded;  // exact in fp32
        put(chunk, i, bits);
        squares += rounded * rounded;
        residual += left * left;
      }
      out[c] = chunk;
    }
    squares = sum_of_lanes(block, squares, lanes);
    residual = sum_of_lanes(block, residual, lanes);
    if (inside && sub == 0) {
      // fp32 sums, and the subtraction of the centre, rounded in fp32
      const float slack = 1.0f + float(padded + 8) * 0x1p-22f, norm = sqrtf(squares) * slack;
      const float error = sqrtf(residual) * slack + norm * 0x1p-22f + 0x1p-40f;
      const int64_t at = head * call.plan.padded_rows + row;
      o.beta[at] = beta;
      o.norm[at] = !live ? -1.0f : bad > 0 ? NAN : norm * beta;
      o.error[at] = fits ? error * beta : INFINITY;
    }
  }
}

template <class Block> VQ_BOTH void pack_block(Block& block, const Call& call) {
  const int64_t head = block.index_y();
  const int part = int(block.index());
  const Frame frame = frame_of(block, call, head);
  if (part == 0 && block.thread() == 0) {
    call.operands.open[head] = 0;
    if (head == 0) *call.operands.decided = 0, *call.operands.ticket = 0;
  }
  if (part < call.plan.code_parts) pack_codes(block, call, frame, head, part);
  else if (call.problem.z.dtype == DType::f64) pack_rows<double>(block, call, frame, head, part - call.plan.code_parts);
  else pack_rows<float>(block, call, frame, head, part - call.plan.code_parts);
}

}  // namespace cuda
}  // namespace vqkernels
