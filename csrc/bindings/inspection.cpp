// Parts of the filters one by one, for tests: plain C functions on contiguous arrays (tests/native/inspection.py).
#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "../cpu/codebook16.h"
#include "../cpu/kernels.h"
#include "../cpu/nearest.h"
#include "exported.h"

using namespace vqkernels;

namespace {

// One row (channels) in every lane of a panel, centred and scaled; `norm` has room for the panel's rows.
std::vector<float> panel_of(const float* row, const PackedCodebook& packed, float* norm) {
  const Sweep& sweep = packed.sweep;
  const int64_t channels = packed.source.channels;
  std::vector<float> panel(channels * sweep.rows);
  for (int64_t d = 0; d < channels; ++d) std::fill_n(&panel[d * sweep.rows], sweep.rows, row[d]);
  sweep.prepare(panel.data(), packed.centre(), packed.scale(), channels, norm);
  return panel;
}

// The lower bound on the score of one code: the sweep of a tile whose other codes are padding.
float bound_of(const PackedCodebook& packed, int64_t slot, const std::vector<float>& panel, const float* norm) {
  const Sweep& sweep = packed.sweep;
  const Tiles tiles = packed.tiles();
  const int64_t channels = packed.source.channels, width = sweep.codes_per_tile;
  std::vector<float> one(channels * width, 0.0f), bias(width, INFINITY), slope(width, 0.0f);
  std::vector<float> best(sweep.rows, INFINITY), second(sweep.rows, INFINITY);
  std::vector<int32_t> found(sweep.rows);
  for (int64_t d = 0; d < channels; ++d)
    one[d * width] = tiles.codes[(slot / width * channels + d) * width + slot % width];
  bias[0] = tiles.bias[slot], slope[0] = tiles.slope[slot];
  sweep.sweep(panel.data(), norm, {one.data(), bias.data(), slope.data(), channels}, 0, 1, best.data(), second.data(),
              found.data());
  return best[0];
}

// One of the integer filters, with the rounded words of one row and what their rounding lost.
struct IntegerPass {
  const IntegerKernels& kernels;
  const Certificate& certificate;
  IntegerTiles tiles;
  decltype(IntegerKernels::sweep_fine) sweep;
  const int32_t* panel;
  const float* residual;
};

// The score of one code: the sweep of a tile whose other codes are padding.
int32_t score_of(const IntegerPass& pass, const Sweep& sweep, int64_t number) {
  const int64_t width = sweep.codes_per_tile, lines = pass.tiles.words + 1;
  std::vector<int32_t> one(lines * width, 0), lowest(sweep.rows), best(sweep.rows, INT32_MAX);
  std::fill_n(one.begin(), width, INT32_MAX);
  const int32_t* tile = pass.tiles.codes + number / width * lines * width;
  for (int64_t line = 0; line < lines; ++line) one[line * width] = tile[line * width + number % width];
  pass.sweep(pass.panel, {one.data(), pass.tiles.words}, 0, 1, lowest.data(), best.data());
  return best[0];
}

// Writes the scores of all codes for one row, and the limit; returns the lowest score.
int32_t run_pass(const IntegerPass& pass, const Sweep& sweep, int64_t size, const float* norm, int32_t* scores,
                 int32_t* limit) {
  for (int64_t k = 0; k < size; ++k) scores[k] = score_of(pass, sweep, k);
  const int32_t lowest = *std::min_element(scores, scores + size);
  const std::vector<int32_t> best(sweep.rows, lowest);
  std::vector<int32_t> limits(sweep.rows);
  pass.kernels.limits(pass.certificate, best.data(), norm, pass.residual, limits.data());
  *limit = limits[0];
  return lowest;
}

}  // namespace

// 2^x of the entropy sweeps at the SIMD level in force.
EXPORTED void vqkernels_exponential(const float* x, float* y, int64_t count) {
  active().entropy.exponential(x, y, count);
}

// The certified float32 filter (euclidean) of rows (n, channels) against a codebook (size, channels): bounds L (n,
// distinct codes), thresholds T (n), the code of each slot, centre (channels) and scale. Returns the number of distinct
// codes.
EXPORTED int64_t vqkernels_filter(const float* rows, int64_t n, const float* codebook, int64_t size, int64_t channels,
                                  float* bounds, float* thresholds, int64_t* code_of_slot, float* centre,
                                  float* scale) {
  const PackedCodebook packed({codebook, DType::f32, size, channels}, DType::f32, Metric::euclidean, true,
                              active().sweep);
  std::vector<float> norm(packed.sweep.rows);
  for (int64_t i = 0; i < n; ++i) {
    const std::vector<float> panel = panel_of(rows + i * channels, packed, norm.data());
    float lowest = INFINITY;
    int32_t lowest_slot = 0;
    for (int64_t slot = 0; slot < packed.size(); ++slot) {
      const float bound = bounds[i * packed.size() + slot] = bound_of(packed, slot, panel, norm.data());
      if (bound < lowest) lowest = bound, lowest_slot = int32_t(slot);
    }
    thresholds[i] = packed.threshold(lowest, norm[0], lowest_slot);
  }
  for (int64_t slot = 0; slot < packed.size(); ++slot) code_of_slot[slot] = packed.index(int32_t(slot));
  std::copy_n(packed.centre(), channels, centre);
  *scale = packed.scale();
  return packed.size();
}

// What the integer filters compute, see codebook16.h: scores F (n, codes in use) and limits floor(T) (n) of the fine
// one and, where there is one, of the coarse one; which rows fit and are clear of the codes set aside (n); the codes in
// use; and the scale of the fine rows. Returns the number of codes in use, or -1 where the filters are not used.
EXPORTED int64_t vqkernels_integer_filter(const float* rows, int64_t n, const float* codebook, int64_t size,
                                          int64_t channels, int32_t* fine_scores, int32_t* fine_limits,
                                          int32_t* coarse_scores, int32_t* coarse_limits, bool* has_coarse, bool* fits,
                                          bool* clear, int64_t* codes, double* scale) {
  const Sweep& sweep = active().sweep;
  const Rows view{rows, DType::f32, 1, n, channels, 0, channels, 1};
  const PackedCodebook packed({codebook, DType::f32, size, channels}, DType::f32, Metric::euclidean, true, sweep);
  const IntegerCodebook integers(packed, integer_row_norm(view, packed, nullptr, true),
                                 [](int64_t count, const std::function<void(int64_t, int64_t)>& f) { f(0, count); });
  if (!integers.usable()) return -1;
  *has_coarse = integers.has_coarse();
  const IntegerKernels& kernels = *sweep.integers;
  std::vector<float> norm(sweep.rows), lost(sweep.rows), coarse_lost(sweep.rows);
  std::vector<int32_t> fine(2 * integers.quads() * sweep.rows), coarse(integers.quads() * sweep.rows);
  for (int64_t i = 0; i < n; ++i) {
    const std::vector<float> panel = panel_of(rows + i * channels, packed, norm.data());
    kernels.round(panel.data(), integers.fine().row_scale, integers.coarse().row_scale, channels, fine.data(),
                  *has_coarse ? coarse.data() : nullptr, lost.data(), coarse_lost.data());
    const int32_t lowest =
        run_pass({kernels, integers.fine(), integers.fine_tiles(), kernels.sweep_fine, fine.data(), lost.data()}, sweep,
                 integers.size(), norm.data(), fine_scores + i * integers.size(), fine_limits + i);
    if (*has_coarse)
      run_pass({kernels, integers.coarse(), integers.coarse_tiles(), kernels.sweep_coarse, coarse.data(),
                coarse_lost.data()},
               sweep, integers.size(), norm.data(), coarse_scores + i * integers.size(), coarse_limits + i);
    fits[i] = integers.fits(norm[0]);
    clear[i] = integers.clear_of_aside(integers.fine(), lowest, norm[0], lost[0]);
  }
  for (int64_t k = 0; k < integers.size(); ++k) codes[k] = packed.index(integers.slot(k));
  *scale = integers.fine().row_scale * double(packed.scale());
  return integers.size();
}
