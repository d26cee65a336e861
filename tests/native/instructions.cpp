// Runs every kernel once inside the function `measured`, which callgrind counts; prints "name<TAB>work" in that order.
//
// `instructions kernels`: the inner kernels one by one; work is rows x codes x channels, or elements.
// `instructions hostile`: whole searches on data that the filters do not like, with and without the int16 filter; work
// is rows x codes x channels.
#include <stdio.h>
#include <string.h>

#include <functional>
#include <string>

#include "../../csrc/cpu/entropy.h"
#include "../../csrc/cpu/quantize.h"
#include "../../csrc/cpu/statistics.h"
#include "search.h"

using namespace native;

extern "C" __attribute__((noinline)) void measured(const std::function<void()>& work) {
  work();
  asm volatile("" ::: "memory");  // no tail call: the function must return after the work
}

namespace {

void count(const std::string& name, double work, const std::function<void()>& body) {
  printf("%s\t%.0f\n", name.c_str(), work);
  fflush(stdout);
  measured(body);
}

struct Random {
  uint64_t state = 88172645463325252ull;
  uint64_t bits() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
  }
  float uniform() { return float(bits() >> 40) * 0x1p-24f; }
  float normal() {
    float sum = -6.0f;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  std::vector<float> normals(int64_t n, float scale = 1.0f) {
    std::vector<float> x(n);
    for (float& v : x) v = scale * normal();
    return x;
  }
};

using Floats = std::vector<float>;
using Words = std::vector<int32_t>;

void inner_kernels(Random& random, const Level& level, int64_t channels) {
  const Sweep& sweep = level.kernels().sweep;
  const std::string tail = std::string(" ") + level.name + " D=" + std::to_string(channels);
  const int64_t rows = sweep.rows, size = 480;
  const Floats codes = random.normals(size * channels);
  const Floats centre(channels, 0.0f);
  const PackedCodebook packed({codes.data(), DType::f32, size, channels}, DType::f32, Metric::euclidean, true, sweep);
  Floats panel = random.normals(rows * channels), norm(rows), best(rows, 1e30f), second(rows, 1e30f);
  Words slot(rows, 0);
  const double elements = double(rows * channels), products = elements * double(size);
  packed.tiles();  // packs them: what is counted below is the sweep alone
  count("prepare" + tail, elements, [&] { sweep.prepare(panel.data(), centre.data(), 1.0f, channels, norm.data()); });
  count("sweep" + tail, products, [&] {
    sweep.sweep(panel.data(), norm.data(), packed.tiles(), 0, packed.tile_count(), best.data(), second.data(),
                slot.data());
  });
  Words slots(size + 1);
  const Floats limit(rows, -1e30f);
  count("sift" + tail, products,
        [&] { sweep.sift(panel.data(), norm.data(), packed.tiles(), size, limit.data(), slots.data()); });
  std::vector<double> wide(rows * channels, 0.5), code(channels, 0.25), score(rows);
  count("contract" + tail, elements, [&] { sweep.contract(wide.data(), code.data(), channels, true, score.data()); });
  if (sweep.integers == nullptr) return;
  const IntegerKernels& kernels = *sweep.integers;
  const IntegerCodebook integers(packed, 2.0 * sqrt(double(channels)), serially);
  const IntegerTiles tiles = integers.fine_tiles();
  Words words(2 * integers.quads() * rows), best16(rows, INT32_MAX), lowest(integers.tile_count() * rows);
  Words limits(rows), number(lowest.size() + rows), value(number);
  Floats residual(rows), coarse_residual(rows);
  count("round" + tail, elements, [&] {
    kernels.round(panel.data(), integers.fine().row_scale, 1.0f, channels, words.data(), nullptr, residual.data(),
                  coarse_residual.data());
  });
  count("sweep int16" + tail, products,
        [&] { kernels.sweep_fine(words.data(), tiles, 0, integers.tile_count(), lowest.data(), best16.data()); });
  count("limits" + tail, double(rows),
        [&] { kernels.limits(integers.fine(), best16.data(), norm.data(), residual.data(), limits.data()); });
  count("scan" + tail, double(rows * size),
        [&] { kernels.scan(lowest.data(), integers.tile_count(), limits.data(), number.data(), value.data()); });
  count("pick" + tail, double(sweep.codes_per_tile * channels),
        [&] { kernels.pick_fine(words.data(), tiles, 3, INT32_MAX, number.data()); });
}

template <class T> std::vector<T> narrowed(const Floats& x) {
  std::vector<T> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) narrow(double(x[i]), &y[i]);
  return y;
}

void fused_tail(Random& random) {
  const int64_t n = 2048, k = 256, d = 64;
  const Floats z = random.normals(n * d), codebook = random.normals(k * d), incoming = random.normals(n * d);
  const std::vector<BFloat16> narrow_z = narrowed<BFloat16>(z);
  std::vector<int64_t> index(n);
  std::vector<int32_t> code(n);
  for (int64_t i = 0; i < n; ++i) index[i] = code[i] = int32_t(random.bits() % k);
  Floats out(n * d), sums(k * d);
  const std::vector<char> yes(n, 1);
  const bool* finite = reinterpret_cast<const bool*>(yes.data());
  std::vector<char> written(n);
  const Codes codes{codebook.data(), DType::f32, k, d};
  const Rows rows = contiguous(z.data(), DType::f32, n, d), first{z.data(), DType::f32, 1, n, d, 0, 1, n};
  const Rows grad = contiguous(incoming.data(), DType::f32, n, d),
             brain = contiguous(narrow_z.data(), DType::bf16, n, d);
  const double elements = double(n * d);
  count("gather float32", elements,
        [&] { gather_rows(rows, codes, {out.data(), n, 0, d, 1}, 0, n, index.data(), finite); });
  count("gather bfloat16", elements,
        [&] { gather_rows(brain, codes, {out.data(), n, 0, d, 1}, 0, n, index.data(), finite); });
  count("gather channels first", elements,
        [&] { gather_rows(first, codes, {out.data(), n, 0, 1, n}, 0, n, index.data(), finite); });
  const auto gradient_by = [&](const std::string& name, Gradient gradient) {
    count(name, elements, [&] {
      gradient_rows(rows, codes, grad, gradient, 0.5, {out.data(), n, 0, d, 1}, 0, n, index.data(),
                    reinterpret_cast<bool*>(written.data()));
    });
  };
  gradient_by("gradient", Gradient::straight_through);
  gradient_by("gradient by rotation", Gradient::rotation);
  Segments segments;
  count("group by code", double(n), [&] { segments = group_by_code(code.data(), n, k); });
  const SegmentSum sum{rows, nullptr, 1.0, DType::f32, sums.data()},
      apart{first, nullptr, 1.0, DType::f32, sums.data()}, gradient{rows, &codes, 0.5, DType::f32, sums.data()};
  count("segment sums", elements, [&] { sum_codes(sum, segments, 0, k); });
  count("segment sums channels first", elements, [&] { sum_channels(apart, code.data(), k, 0, d); });
  count("segment sums of the gradient", elements, [&] { sum_codes(gradient, segments, 0, k); });
}

void whole_search(const std::string& name, const Floats& z, const Floats& codes, int64_t d, const Sweep& sweep,
                  bool integers) {
  const int64_t n = int64_t(z.size()) / d, k = int64_t(codes.size()) / d;
  std::vector<int64_t> index(n);
  std::vector<char> finite(n);
  Query q{contiguous(z.data(), DType::f32, n, d), {codes.data(), DType::f32, k, d}};
  q.sweep = &sweep, q.integers = integers;
  count(name, double(n * k * d), [&] { search(q, index.data(), reinterpret_cast<bool*>(finite.data())); });
}

void whole_searches(Random& random, const Level& level) {
  for (const auto& [n, k, d] :
       {std::tuple<int64_t, int64_t, int64_t>{1024, 512, 64}, {2048, 512, 8}, {512, 1024, 256}}) {
    const Floats z = random.normals(n * d), codes = random.normals(k * d);
    whole_search(std::string("search ") + level.name + " K=" + std::to_string(k) + " D=" + std::to_string(d), z, codes,
                 d, level.kernels().sweep, true);
  }
}

// Panels against a stream of 480 items, whose probabilities are all positive.
void entropy_sweeps(Random& random, const Level& level, int64_t channels) {
  const EntropyKernels<float>& kernels = level.kernels().entropy;
  const std::string tail = std::string(" ") + level.name + " D=" + std::to_string(channels);
  const int64_t lanes = kernels.lanes, size = 480;
  const Floats panel = random.normals(lanes * channels, 0.1f), items = random.normals(size * channels, 0.1f);
  const Floats bias = random.normals(size), weight = random.normals(size), partition(size, 9.0f), share(size, 1.0f);
  const Stream<float> stream{items.data(), bias.data(),   weight.data(),       partition.data(),
                             share.data(), weight.data(), size / kernels.tile, channels};
  Floats found(2 * lanes), scratch(2 * channels * lanes);
  std::vector<double> sum(lanes), weighted(lanes), gradient(2 * channels * lanes);
  const double products = double(lanes * size * channels);
  count("entropy forward" + tail, products,
        [&] { kernels.forward(panel.data(), stream, found.data(), found.data() + lanes, sum.data()); });
  count("entropy mean" + tail, products, [&] { kernels.mean(panel.data(), bias.data(), stream, sum.data()); });
  count("entropy gradient of rows" + tail, products, [&] {
    kernels.rows_backward(panel.data(), stream, partition.data(), weight.data(), -0.5f, sum.data(), weighted.data(),
                          gradient.data(), scratch.data());
  });
  count("entropy gradient of codes" + tail, products, [&] {
    kernels.codes_backward(panel.data(), bias.data(), weight.data(), stream, -0.5f, sum.data(), gradient.data(),
                           scratch.data());
  });
}

void kernels(const std::vector<Level>& some) {
  Random random;
  for (const Level& level : some) {
    for (int64_t channels : {8, 64, 256}) inner_kernels(random, level, channels);
    whole_searches(random, level);
  }
  const int64_t k = 512, d = 64;
  const Floats codes = random.normals(k * d);
  const Sweep& sweep = some.back().kernels().sweep;
  const Codes view{codes.data(), DType::f32, k, d};
  count("measure codebook", double(k * d), [&] { PackedCodebook(view, DType::f32, Metric::euclidean, true, sweep); });
  const PackedCodebook packed(view, DType::f32, Metric::euclidean, true, sweep);
  count("pack float32 tiles", double(k * d), [&] { packed.tiles(); });
  if (sweep.integers != nullptr) count("pack int16", double(k * d), [&] { IntegerCodebook(packed, 16.0, serially); });
  fused_tail(random);
  for (const Level& level : some)
    for (int64_t channels : {8, 32, 256}) entropy_sweeps(random, level, channels);
}

// Three rounds of Lloyd's algorithm from the first rows.
Floats fitted(const Floats& z, int64_t k, int64_t d, const Sweep& sweep) {
  const int64_t n = int64_t(z.size()) / d;
  Floats codes(z.begin(), z.begin() + k * d);
  std::vector<int64_t> index(n);
  std::vector<char> finite(n);
  for (int round = 0; round < 3; ++round) {
    Query q{contiguous(z.data(), DType::f32, n, d), {codes.data(), DType::f32, k, d}};
    q.sweep = &sweep;
    search(q, index.data(), reinterpret_cast<bool*>(finite.data()));
    std::vector<double> sum(k * d, 0.0), rows(k, 0.0);
    for (int64_t i = 0; i < n; ++i) {
      rows[index[i]] += 1;
      for (int64_t c = 0; c < d; ++c) sum[index[i] * d + c] += z[i * d + c];
    }
    for (int64_t j = 0; j < k * d; ++j)
      if (rows[j / d] > 0) codes[j] = float(sum[j] / rows[j / d]);
  }
  return codes;
}

void hostile(const Sweep& sweep) {
  Random random;
  const int64_t n = 4096, k = 128, d = 64;  // many chunks of rows: what the first ones teach is used by the others
  const Floats z = random.normals(n * d), plain = random.normals(k * d);
  const auto both = [&](const std::string& name, const Floats& rows, const Floats& codes) {
    whole_search(name, rows, codes, d, sweep, true);
    whole_search(name + ", float32 alone", rows, codes, d, sweep, false);
  };
  both("gaussian", z, plain);
  Floats codes = plain;
  for (int64_t c = 0; c < d; ++c) codes[7 * d + c] *= 1000.0f;
  both("outlier code", z, codes);
  Floats lattice(n * d), few(k * d);
  for (float& x : lattice) x = float(random.bits() % 3) - 1.0f;
  for (float& x : few) x = float(random.bits() % 3) - 1.0f;
  both("ties on a lattice", lattice, few);
  codes = plain;
  for (int64_t j = k / 2 * d; j < k * d; ++j) codes[j] = nextafterf(codes[j - k / 2 * d], 10.0f);
  both("codes in pairs one ulp apart", z, codes);
  both("collapsed codebook", z, random.normals(k * d, 1e-3f));
  both("codebook collapsed to a millionth", z, random.normals(k * d, 1e-6f));
  codes = random.normals(k * d, 1e-3f);
  for (float& x : codes) x += 3.0f;
  both("codebook collapsed far from the rows", z, codes);
  Floats scaled = z;
  for (int64_t i = 0; i < n; i += 2)
    for (int64_t c = 0; c < d; ++c) scaled[i * d + c] *= 1e4f;
  both("rows far out of scale", scaled, plain);
  Floats skewed = random.normals(n * d);
  for (int64_t i = 0; i < n; ++i) skewed[i * d] *= 50.0f;
  both("k-means with a large coordinate", skewed, fitted(skewed, k, d, sweep));
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<Level> some(levels().begin(),
                                levels().begin() + std::min<size_t>(2, levels().size()));  // no AVX-512:
  // valgrind does not know it
  if (argc == 2 && strcmp(argv[1], "kernels") == 0) kernels(some);
  else if (argc == 2 && strcmp(argv[1], "hostile") == 0) hostile(some.back().kernels().sweep);
  else return fprintf(stderr, "usage: instructions kernels|hostile\n"), 2;
  return 0;
}
