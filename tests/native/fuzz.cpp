// Random inputs for the raw kernels, compared with a plain float64 contract written here. Built with sanitizers.
//
// `fuzz LEVEL SECONDS SEED`: searches, look-ups, gradients and statistics of random shapes, types, strides, masks and
// data, until the time is over; with 0 seconds the one case of that seed, as a failure prints it. Every buffer is
// allocated at its exact size, and masked rows are poisoned, so that reading one element too many is an error. Prints
// the number of cases, or the first wrong result, and then exits with 1.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <chrono>
#include <limits>
#include <string>

#include "../../csrc/cpu/quantize.h"
#include "../../csrc/cpu/statistics.h"
#include "search.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

using namespace native;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Random {
  uint64_t state;
  uint64_t bits() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state * 0x2545f4914f6cdd1dull >> 11;
  }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  bool chance(double p) { return uniform() < p; }
  double uniform() { return double(bits()) * 0x1p-53; }
  double normal() {
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  template <size_t n> int64_t pick(const int64_t (&from)[n]) { return from[below(int64_t(n))]; }
};

int64_t bytes_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

// Conversions of this file's own: _Float16 is the compiler's, bfloat16 the nearer of the two neighbours, ties to even.
double read(const void* data, DType type, int64_t at) {
  if (type == DType::f64) return static_cast<const double*>(data)[at];
  if (type == DType::f32) return double(static_cast<const float*>(data)[at]);
  if (type == DType::f16) return double(static_cast<const _Float16*>(data)[at]);
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[at]) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return double(value);
}

uint16_t nearest_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  const uint16_t low = uint16_t(bits >> 16), high = uint16_t(low + 1);  // neighbours towards and away from zero
  const uint32_t rest = bits & 0xffff;
  return rest < 0x8000 || (rest == 0x8000 && low % 2 == 0) ? low : high;
}

void write(void* data, DType type, int64_t at, double x) {
  if (type == DType::f64) static_cast<double*>(data)[at] = x;
  else if (type == DType::f32) static_cast<float*>(data)[at] = float(x);
  else if (type == DType::f16) static_cast<_Float16*>(data)[at] = _Float16(float(x));
  else static_cast<uint16_t*>(data)[at] = nearest_bfloat16(float(x));
}

// A tensor (batch, positions, channels) in one of several layouts, in an allocation of exactly its size.
struct Block {
  DType type;
  int64_t batch, positions, channels, batch_stride, position_stride, channel_stride;
  void* data;

  Block(Random& random, DType t, int64_t b, int64_t p, int64_t c) : type(t), batch(b), positions(p), channels(c) {
    const int64_t gap = random.chance(0.3) ? 1 + random.below(5) : 0;
    if (random.chance(0.5)) {  // channels last
      channel_stride = random.chance(0.2) ? 2 : 1;
      position_stride = channels * channel_stride + gap;
      batch_stride = positions * position_stride + (gap ? 3 : 0);
    } else {  // channels first, as images are
      position_stride = random.chance(0.2) ? 2 : 1;
      channel_stride = positions * position_stride + gap;
      batch_stride = channels * channel_stride + (gap ? 2 : 0);
    }
    const int64_t empty = batch == 0 || positions == 0 || channels == 0;
    const int64_t last =
        (batch - 1) * batch_stride + (positions - 1) * position_stride + (channels - 1) * channel_stride;
    data = malloc(size_t((empty ? 0 : last + 1) * bytes_of(type)));
    if (!empty) memset(data, 0xff, size_t((last + 1) * bytes_of(type)));  // NaN where nothing is written
  }
  ~Block() { free(data); }
  Block(const Block&) = delete;

  int64_t count() const { return batch * positions; }
  int64_t at(int64_t row, int64_t d) const {
    return (row / positions) * batch_stride + (row % positions) * position_stride + d * channel_stride;
  }
  double get(int64_t row, int64_t d) const { return read(data, type, at(row, d)); }
  void set(int64_t row, int64_t d, double x) { write(data, type, at(row, d), x); }
  Rows rows() const { return {data, type, batch, positions, channels, batch_stride, position_stride, channel_stride}; }
  RowsOut out() const { return {data, positions, batch_stride, position_stride, channel_stride}; }
  void poison(int64_t row, bool on) const {
    for (int64_t d = 0; d < channels; ++d) {
      void* address = static_cast<char*>(data) + at(row, d) * bytes_of(type);
      if (on) ASAN_POISON_MEMORY_REGION(address, size_t(bytes_of(type)));
      else ASAN_UNPOISON_MEMORY_REGION(address, size_t(bytes_of(type)));
    }
  }
};

enum class Kind {
  gaussian,
  lattice,
  duplicates,
  near_ties,
  collapsed,
  offset,
  outlier,
  scales,
  tiny,
  huge,
  on_codes,
  midpoints,
  last
};

struct Case {
  uint64_t seed;
  Kind kind;
  Metric metric;
  DType z_type, code_type;
  int64_t batch, positions, size, channels, chunk;
  bool masked, bad_rows, bad_codes, certified;
};

[[noreturn]] void fail(const Case& c, const std::string& what) {
  printf(
      "%s\nfuzz LEVEL 0 %llu: kind %d metric %d types %d %d batch %lld positions %lld K %lld D %lld chunk %lld masked "
      "%d bad %d %d\n",
      what.c_str(), (unsigned long long)c.seed, int(c.kind), int(c.metric), int(c.z_type), int(c.code_type),
      (long long)c.batch, (long long)c.positions, (long long)c.size, (long long)c.channels, (long long)c.chunk,
      c.masked, c.bad_rows, c.bad_codes);
  exit(1);
}

Case draw(Random& random) {
  constexpr int64_t kCounts[] = {0, 1, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 97, 131, 257, 263};
  constexpr int64_t kSizes[] = {1, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 24, 25, 31, 64, 127, 128, 257, 509};
  constexpr int64_t kChannels[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 61, 64, 65, 127, 128};
  constexpr int64_t kChunks[] = {1, 7, 32, 100, kChunk, kChunk};
  Case c;
  c.seed = random.state;
  c.kind = Kind(random.below(int64_t(Kind::last)));
  c.metric = random.chance(0.6) ? Metric::euclidean : random.chance(0.5) ? Metric::dot : Metric::cosine;
  c.z_type = random.chance(0.5) ? DType::f32 : DType(random.below(4));
  c.code_type = random.chance(0.7) ? c.z_type : DType(random.below(4));
  c.batch = random.chance(0.6) ? 1 : random.below(4), c.positions = random.pick(kCounts);
  c.size = random.pick(kSizes), c.channels = random.pick(kChannels), c.chunk = random.pick(kChunks);
  while (c.batch * c.positions * c.size * c.channels > 1000000) c.size = std::max<int64_t>(1, c.size / 2);
  c.masked = random.chance(0.3), c.bad_rows = random.chance(0.2), c.bad_codes = random.chance(0.15);
  c.certified = random.chance(0.9);
  return c;
}

double bad_value(Random& random) {
  const double values[] = {std::nan(""), kInfinity, -kInfinity};
  return values[random.below(3)];
}

void fill(Random& random, const Case& c, Block& z, std::vector<char>& codes) {
  const int64_t k = c.size, d = c.channels;
  const auto code = [&](int64_t j, int64_t i) { return read(codes.data(), c.code_type, j * d + i); };
  const auto put = [&](int64_t j, int64_t i, double x) { write(codes.data(), c.code_type, j * d + i, x); };
  const double scale = c.kind == Kind::tiny ? 1e-30 : c.kind == Kind::huge ? 1e17 : 1.0;
  const bool integral = c.kind == Kind::lattice;
  const auto value = [&] { return integral ? double(random.below(3)) - 1.0 : scale * random.normal(); };
  for (int64_t j = 0; j < k; ++j)
    for (int64_t i = 0; i < d; ++i)  // midpoints: all on one line, where the roundings of a row and of a code add up
      put(j, i, c.kind == Kind::midpoints && i > 0 ? 0.0 : value() * (c.kind == Kind::collapsed ? 1e-4 : 1.0));
  for (int64_t j = 0; j < k; ++j) {
    const int64_t twin = random.below(k);
    const double nudge = c.kind == Kind::near_ties ? 1.0 + 0x1p-23 : 1.0;
    if ((c.kind == Kind::duplicates || c.kind == Kind::near_ties) && random.chance(0.5))
      for (int64_t i = 0; i < d; ++i) put(j, i, code(twin, i) * (i == 0 ? nudge : 1.0));
    for (int64_t i = 0; c.kind == Kind::offset && i < d; ++i) put(j, i, code(j, i) + 1000.0);
    for (int64_t i = 0; c.kind == Kind::outlier && j == k / 2 && i < d; ++i) put(j, i, code(j, i) * 3000.0);
  }
  for (int64_t r = 0; r < z.count(); ++r) {
    const int64_t near = random.below(k);
    const double size = c.kind == Kind::scales ? exp(6.0 * random.normal()) : 1.0;
    for (int64_t i = 0; i < d; ++i) {
      const double x = value();
      z.set(r, i, c.kind == Kind::on_codes ? code(near, i) : c.kind == Kind::offset ? x + 1000.0 : x * size);
    }
    if (c.kind == Kind::midpoints) {  // almost as far from a code as from its nearest neighbour
      double step = kInfinity;
      for (int64_t j = 0; j < k; ++j)
        if (code(j, 0) != code(near, 0) && fabs(code(j, 0) - code(near, 0)) < fabs(step))
          step = code(j, 0) - code(near, 0);
      for (int64_t i = 0; i < d; ++i) z.set(r, i, 0.0);
      if (std::isfinite(step))
        z.set(r, 0, code(near, 0) + step * (0.5 + random.normal() * exp(-15.0 * random.uniform())));
    }
    if (c.bad_rows && random.chance(0.2)) z.set(r, random.below(d), bad_value(random));
  }
  for (int64_t j = 0; c.bad_codes && j < k; ++j)
    if (random.chance(0.3)) put(j, random.below(d), bad_value(random));
}

// The contract of one row: the lowest index of the smallest float64 score among the finite codes, 0 where there is
// none.
int64_t contract(const Case& c, const Block& z, int64_t row, const std::vector<char>& codes) {
  int64_t best = 0;
  double lowest = kInfinity;
  for (int64_t j = 0; j < c.size; ++j) {
    double distance = 0.0, product = 0.0, square = 0.0;
    bool finite = true;
    for (int64_t i = 0; i < c.channels; ++i) {
      const double e = read(codes.data(), c.code_type, j * c.channels + i), x = z.get(row, i), difference = x - e;
      finite = finite && std::isfinite(e);
      distance += difference * difference;
      product += x * e;
      square += e * e;
    }
    if (!finite) continue;
    const double norm = sqrt(square);
    const double score = c.metric == Metric::euclidean ? distance
                         : c.metric == Metric::dot     ? -product
                         : norm > 0.0                  ? -product / norm
                                                       : 0.0;
    if (score < lowest) lowest = score, best = j;
  }
  // Where every score is infinite, the lowest finite code is as good as any.
  for (int64_t j = 0; lowest == kInfinity && j < c.size; ++j) {
    bool finite = true;
    for (int64_t i = 0; i < c.channels; ++i)
      finite = finite && std::isfinite(read(codes.data(), c.code_type, j * c.channels + i));
    if (finite) return j;
  }
  return best;
}

bool same(double a, double b) { return a == b || (a != a && b != b); }

// Sums of 8 partial sums differ from those of one by a few roundings.
bool close(double a, double b) { return same(a, b) || fabs(a - b) <= 1e-11 * fabs(b); }

// The rotation trick: |e|/|z| (g - 2 (g.s) s / (s.s) + 2 (g.q) u) for u = z/|z|, q = e/|e|, s = u + q, plus scale (z -
// e). Rows whose norms leave the range of a plain computation, or whose code lies opposite to them, are not looked at.
void check_rotation(const Case& c, const Block& z, const std::vector<char>& codes, const Block& incoming,
                    const Block& rotated, double scale, int64_t row, int64_t index, bool finite) {
  const int64_t d = c.channels;
  const auto code = [&](int64_t i) { return read(codes.data(), c.code_type, index * d + i); };
  if (index < 0 || !finite) {
    for (int64_t i = 0; i < d; ++i)
      if (!same(rotated.get(row, i), index < 0 ? 0.0 : std::nan("")))
        fail(c, "a wrong rotated gradient of a row without one");
    return;
  }
  double zz = 0.0, ee = 0.0, ss = 0.0, gs = 0.0, gq = 0.0, gg = 0.0;
  for (int64_t i = 0; i < d; ++i) zz += z.get(row, i) * z.get(row, i), ee += code(i) * code(i);
  const double z_norm = sqrt(zz), e_norm = sqrt(ee);
  if (!(zz > 1e-200 && zz < 1e200 && ee > 1e-200 && ee < 1e200)) return;
  for (int64_t i = 0; i < d; ++i) {
    const double q = code(i) / e_norm, s = z.get(row, i) / z_norm + q, g = incoming.get(row, i);
    ss += s * s, gs += g * s, gq += g * q, gg += g * g;
  }
  if (!(ss > 1e-4)) return;
  for (int64_t i = 0; i < d; ++i) {
    const double u = z.get(row, i) / z_norm, s = u + code(i) / e_norm, g = incoming.get(row, i);
    const double ratio = e_norm / z_norm, shift = scale * (z.get(row, i) - code(i));
    const double wanted = ratio * (g - 2 * gs / ss * s + 2 * gq * u) + shift, found = rotated.get(row, i);
    const bool half = c.z_type == DType::f16;
    const double rounding = half                      ? 0x1p-10
                            : c.z_type == DType::bf16 ? 0x1p-7
                            : c.z_type == DType::f32  ? 0x1p-23
                                                      : 0x1p-52;
    const double slack = rounding * fabs(wanted) + 1e-9 * (ratio * sqrt(gg) + fabs(shift)) + (half ? 0x1p-24 : 1e-38);
    const bool overflows = fabs(wanted) > (half ? 65000.0 : 3e38) && c.z_type != DType::f64;
    if (!overflows && !(fabs(found - wanted) <= slack))
      fail(c, "a wrong rotated gradient: " + std::to_string(found) + ", not " + std::to_string(wanted));
  }
}

void check_tail(Random& random, const Case& c, const Block& z, const std::vector<char>& codes, const int64_t* index,
                bool* finite) {
  const int64_t n = z.count(), k = c.size, d = c.channels;
  const Codes book{codes.data(), c.code_type, k, d};
  const auto code = [&](int64_t j, int64_t i) { return read(codes.data(), c.code_type, j * d + i); };

  const Block quantized(random, c.z_type, c.batch, c.positions, d);
  double total = 0.0, expected = 0.0;
  for (int64_t begin = 0; begin < n; begin += c.chunk) {
    const int64_t end = std::min(begin + c.chunk, n);
    total += gather_rows(z.rows(), book, quantized.out(), begin, end, index + begin, finite + begin);
  }
  const Block rounded(random, c.z_type, 1, 1, 1);
  const auto as_z = [&](double x) { return write(rounded.data, c.z_type, 0, x), rounded.get(0, 0); };
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t i = 0; i < d; ++i) {
      if (!same(quantized.get(r, i), index[r] < 0 ? 0.0 : as_z(code(index[r], i)))) fail(c, "a wrong look-up");
      if (index[r] < 0) continue;
      const double residual = z.get(r, i) - code(index[r], i);
      expected += finite[r] ? residual * residual : std::nan("");
    }
  }
  if (!close(total, expected))
    fail(c, "a wrong squared error: " + std::to_string(total) + ", not " + std::to_string(expected));

  Block incoming(random, c.z_type, c.batch, c.positions, d);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i < d; ++i) incoming.set(r, i, random.normal());
  const Block gradient(random, c.z_type, c.batch, c.positions, d), rotated(random, c.z_type, c.batch, c.positions, d);
  const double scale = random.normal();
  for (int64_t begin = 0; begin < n; begin += c.chunk) {
    const int64_t end = std::min(begin + c.chunk, n);
    gradient_rows(z.rows(), book, incoming.rows(), Gradient::straight_through, scale, gradient.out(), begin, end,
                  index + begin, finite + begin);
    gradient_rows(z.rows(), book, incoming.rows(), Gradient::rotation, scale, rotated.out(), begin, end, index + begin,
                  finite + begin);
  }
  std::vector<int32_t> chosen(n);
  for (int64_t r = 0; r < n; ++r) {
    chosen[r] = index[r] >= 0 && finite[r] ? int32_t(index[r]) : -1;
    for (int64_t i = 0; i < d; ++i) {
      const double wanted = index[r] < 0 ? 0.0
                            : !finite[r] ? std::nan("")
                                         : as_z(incoming.get(r, i) + scale * (z.get(r, i) - code(index[r], i)));
      if (!same(gradient.get(r, i), wanted)) fail(c, "a wrong gradient");
    }
    check_rotation(c, z, codes, incoming, rotated, scale, r, index[r], finite[r]);
  }

  const bool of_codebook = random.chance(0.5);
  const Segments segments = group_by_code(chosen.data(), n, k);
  const DType out_type = of_codebook ? c.code_type : c.z_type == DType::f64 ? DType::f64 : DType::f32;
  std::vector<char> by_code(size_t(k * d * bytes_of(out_type)), 1), by_channel(by_code.size(), 1);
  const int64_t parts = 1 + random.below(5), middle = random.below(d + 1);
  const std::vector<int64_t> boundary = balance_codes(segments, parts);
  const Codes* subtracted = of_codebook ? &book : nullptr;
  for (int64_t p = 0; p < parts; ++p)
    sum_codes({z.rows(), subtracted, scale, out_type, by_code.data()}, segments, boundary[p], boundary[p + 1]);
  sum_channels({z.rows(), subtracted, scale, out_type, by_channel.data()}, chosen.data(), k, 0, middle);
  sum_channels({z.rows(), subtracted, scale, out_type, by_channel.data()}, chosen.data(), k, middle, d);
  if (by_code != by_channel) fail(c, "sums by code and by channel differ");
  const Block one(random, out_type, 1, 1, 1);
  for (int64_t j = 0; j < k; ++j) {
    if (segments.start[j + 1] - segments.start[j] != std::count(chosen.begin(), chosen.end(), int32_t(j)))
      fail(c, "a wrong count");
    for (int64_t i = 0; i < d; ++i) {
      double sum = 0.0;
      for (int64_t r = 0; r < n; ++r)
        if (chosen[r] == j) sum += of_codebook ? code(j, i) - z.get(r, i) : z.get(r, i);
      write(one.data, out_type, 0, segments.start[j + 1] > segments.start[j] ? scale * sum : 0.0);
      if (!same(read(by_code.data(), out_type, j * d + i), one.get(0, 0))) fail(c, "a wrong sum");
    }
  }
}

void run(Random& random, const Sweep& sweep, int64_t* searched) {
  const Case c = draw(random);
  Block z(random, c.z_type, c.batch, c.positions, c.channels);
  std::vector<char> codes(size_t(c.size * c.channels * bytes_of(c.code_type)));
  codes.shrink_to_fit();
  fill(random, c, z, codes);
  const int64_t n = z.count();
  std::vector<char> mask(n), finite(n, 0), readable(n, 1);
  std::vector<int64_t> index(n, -7), wanted(n);
  for (int64_t r = 0; r < n; ++r) mask[r] = !c.masked || random.chance(0.6);
  for (int64_t r = 0; r < n; ++r) {
    bool good = true;
    for (int64_t i = 0; i < c.channels; ++i) good = good && std::isfinite(z.get(r, i));
    readable[r] = good || !mask[r];
    wanted[r] = !mask[r] ? -1 : good ? contract(c, z, r, codes) : 0;
    if (!mask[r]) z.poison(r, true);
  }
  Query query{z.rows(), {codes.data(), c.code_type, c.size, c.channels}};
  query.metric = c.metric, query.sweep = &sweep, query.certified = c.certified;
  query.mask = c.masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr;
  bool* good = reinterpret_cast<bool*>(finite.data());
  const int64_t decided = search(query, index.data(), good, c.chunk);
  if (finite != readable) fail(c, "a wrong row is called finite");
  const int64_t kept = std::count(mask.begin(), mask.end(), char(1));
  if (decided < 0 || decided > kept) fail(c, "more rows decided than there are");
  for (int64_t r = 0; r < n; ++r) {
    const bool right =
        c.certified ? index[r] == wanted[r] : index[r] >= -1 && index[r] < c.size && (index[r] < 0) == !mask[r];
    if (!right)
      fail(c,
           "row " + std::to_string(r) + ": index " + std::to_string(index[r]) + ", not " + std::to_string(wanted[r]));
  }
  check_tail(random, c, z, codes, index.data(), good);  // a masked row stays poisoned: its index alone may be looked at
  for (int64_t r = 0; r < n; ++r)
    if (!mask[r]) z.poison(r, false);
  *searched += n * c.size;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return fprintf(stderr, "usage: fuzz LEVEL SECONDS SEED\n"), 2;
  for (const Level& level : levels()) {
    if (strcmp(argv[1], level.name) != 0) continue;
    const double seconds = atof(argv[2]);
    const uint64_t seed = strtoull(argv[3], nullptr, 10);
    Random random{seconds > 0 ? seed * 0x9e3779b97f4a7c15ull + 1 : seed};
    const auto start = std::chrono::steady_clock::now();
    int64_t cases = 0, scores = 0;
    do run(random, level.kernels().sweep, &scores), ++cases;
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
    printf("%lld cases, %lld scores\n", (long long)cases, (long long)scores);
    return 0;
  }
  return printf("this CPU lacks %s\n", argv[1]), 3;
}
