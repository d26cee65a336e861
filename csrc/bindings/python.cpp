// The optional module vqkernels._C: information, and the inner kernels one by one for tests and micro-benchmarks.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <vector>

#include "../cpu/entropy.h"
#include "../cpu/nearest.h"
#include "peak.h"

namespace py = pybind11;
using namespace vqkernels;

namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using DoubleArray = py::array_t<double, py::array::c_style | py::array::forcecast>;

// Lower bounds L (rows, distinct codes), thresholds T and slots of the filter, for rows (N, D) against codebook (K, D).
py::dict filter(const FloatArray& rows, const FloatArray& codebook) {
  const Sweep& sweep = active_sweep();
  const int64_t n = rows.shape(0), channels = rows.shape(1);
  const Codes codes{codebook.data(), DType::f32, codebook.shape(0), channels};
  const PackedCodebook packed(codes, DType::f32, Metric::euclidean, true, sweep);
  py::array_t<float> bounds({n, packed.size()}), thresholds(n);
  std::vector<int64_t> code_of_slot(packed.size());
  for (int64_t slot = 0; slot < packed.size(); ++slot) code_of_slot[slot] = packed.index(int32_t(slot));
  std::vector<float> panel(channels * sweep.rows), norm(sweep.rows), best(sweep.rows), second(sweep.rows);
  std::vector<int32_t> slot(sweep.rows);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < channels; ++d)
      std::fill_n(&panel[d * sweep.rows], sweep.rows, rows.at(i, d));
    sweep.prepare(panel.data(), packed.centre(), packed.scale(), channels, norm.data());
    float lowest = INFINITY;
    int32_t lowest_slot = 0;
    for (int64_t k = 0; k < packed.size(); ++k) {
      // One code at a time: a tile set whose other codes are padding.
      std::vector<float> one(channels * sweep.codes_per_tile, 0.0f), bias(sweep.codes_per_tile, INFINITY),
          slope(sweep.codes_per_tile, 0.0f);
      const Tiles tiles = packed.tiles();
      const int64_t tile = k / sweep.codes_per_tile, c = k % sweep.codes_per_tile;
      for (int64_t d = 0; d < channels; ++d)
        one[d * sweep.codes_per_tile] = tiles.codes[(tile * channels + d) * sweep.codes_per_tile + c];
      bias[0] = tiles.bias[k];
      slope[0] = tiles.slope[k];
      std::fill(best.begin(), best.end(), INFINITY);
      std::fill(second.begin(), second.end(), INFINITY);
      sweep.sweep(panel.data(), norm.data(), {one.data(), bias.data(), slope.data(), channels}, 0, 1, best.data(),
                  second.data(), slot.data());
      bounds.mutable_at(i, k) = best[0];
      if (best[0] < lowest) lowest = best[0], lowest_slot = int32_t(k);
    }
    thresholds.mutable_at(i) = packed.threshold(lowest, norm[0], lowest_slot);
  }
  py::dict out;
  out["bounds"] = bounds;
  out["thresholds"] = thresholds;
  out["code_of_slot"] = code_of_slot;
  out["scale"] = packed.scale();
  out["centre"] = std::vector<float>(packed.centre(), packed.centre() + channels);
  return out;
}

// Scores F (rows, codes) and limits floor(T) of one integer filter, one code at a time: a tile whose others are padding.
py::dict integer_scores(const Sweep& sweep, const IntegerTiles& tiles, const Certificate& certificate, bool coarse,
                        int64_t size, const std::vector<std::vector<int32_t>>& rows, const std::vector<float>& norms,
                        const std::vector<float>& residuals) {
  const int64_t n = int64_t(rows.size()), per_tile = sweep.codes_per_tile;
  const auto kernel = coarse ? sweep.integers->sweep_coarse : sweep.integers->sweep_fine;
  py::array_t<int64_t> scores({n, size}), limits(n);
  std::vector<int32_t> panel(tiles.words * sweep.rows), one((tiles.words + 1) * per_tile), lowest(sweep.rows),
      best(sweep.rows), limit(sweep.rows);
  for (int64_t i = 0; i < n; ++i) {
    const std::vector<const int32_t*> at(sweep.rows, rows[i].data());
    sweep.transpose(at.data(), sweep.rows, tiles.words, panel.data(), sweep.rows);
    int32_t winner = INT32_MAX;
    for (int64_t k = 0; k < size; ++k) {
      const int32_t* tile = tiles.codes + (k / per_tile) * (tiles.words + 1) * per_tile;
      std::fill(one.begin(), one.end(), 0);
      std::fill_n(one.begin(), per_tile, INT32_MAX);
      for (int64_t line = 0; line <= tiles.words; ++line) one[line * per_tile] = tile[line * per_tile + k % per_tile];
      std::fill(best.begin(), best.end(), INT32_MAX);
      kernel(panel.data(), {one.data(), tiles.words}, 0, 1, lowest.data(), best.data());
      scores.mutable_at(i, k) = best[0];
      winner = std::min(winner, best[0]);
    }
    const std::vector<int32_t> bests(sweep.rows, winner);
    const std::vector<float> norm(sweep.rows, norms[i]), residual(sweep.rows, residuals[i]);
    sweep.integers->limits(certificate, bests.data(), norm.data(), residual.data(), limit.data());
    limits.mutable_at(i) = limit[0];
  }
  py::dict out;
  out["scores"] = scores;
  out["limits"] = limits;
  return out;
}

// What the integer filters compute, see codebook16.h: scores and limits of each, which rows fit, and the codes in use.
py::dict integer_filter(const FloatArray& rows, const FloatArray& codebook) {
  const Sweep& sweep = active_sweep();
  const int64_t n = rows.shape(0), channels = rows.shape(1);
  const Rows view{rows.data(), DType::f32, 1, n, channels, 0, channels, 1};
  const PackedCodebook packed({codebook.data(), DType::f32, codebook.shape(0), channels}, DType::f32, Metric::euclidean,
                              true, sweep);
  const IntegerCodebook integers(packed, integer_row_norm(view, packed, nullptr, true),
                                 [](int64_t count, const std::function<void(int64_t, int64_t)>& f) { f(0, count); });
  py::dict out;
  out["usable"] = integers.usable();
  if (!integers.usable()) return out;
  const bool coarse = integers.has_coarse();
  const int64_t quads = integers.quads();
  std::vector<std::vector<int32_t>> fine(n, std::vector<int32_t>(2 * quads)), bytes(n, std::vector<int32_t>(quads));
  std::vector<float> norm(n), residual(n), coarse_residual(n), panel(channels * sweep.rows), norms(sweep.rows),
      lost(sweep.rows), coarse_lost(sweep.rows);
  std::vector<int32_t> fine_panel(2 * quads * sweep.rows), coarse_panel(quads * sweep.rows);
  py::array_t<bool> fits(n), clear(n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < channels; ++d) std::fill_n(&panel[d * sweep.rows], sweep.rows, rows.at(i, d));
    sweep.prepare(panel.data(), packed.centre(), packed.scale(), channels, norms.data());
    sweep.integers->round(panel.data(), integers.fine().row_scale, integers.coarse().row_scale, channels,
                          fine_panel.data(), coarse ? coarse_panel.data() : nullptr, lost.data(), coarse_lost.data());
    for (int64_t w = 0; w < integers.pairs(); ++w) fine[i][w] = fine_panel[w * sweep.rows];
    for (int64_t w = 0; coarse && w < quads; ++w) bytes[i][w] = coarse_panel[w * sweep.rows];
    norm[i] = norms[0], residual[i] = lost[0], coarse_residual[i] = coarse_lost[0];
    fits.mutable_at(i) = integers.fits(norm[i]);
  }
  out["fine"] = integer_scores(sweep, integers.fine_tiles(), integers.fine(), false, integers.size(), fine, norm, residual);
  if (coarse)
    out["coarse"] = integer_scores(sweep, integers.coarse_tiles(), integers.coarse(), true, integers.size(), bytes, norm,
                                   coarse_residual);
  const auto scores = out["fine"]["scores"].cast<py::array_t<int64_t>>();
  for (int64_t i = 0; i < n; ++i) {
    int64_t best = INT32_MAX;
    for (int64_t k = 0; k < integers.size(); ++k) best = std::min(best, scores.at(i, k));
    clear.mutable_at(i) = integers.clear_of_aside(integers.fine(), int32_t(best), norm[i], residual[i]);
  }
  std::vector<int64_t> code_of_number(integers.size());
  for (int64_t k = 0; k < integers.size(); ++k) code_of_number[k] = packed.index(integers.slot(k));
  out["fits"] = fits;
  out["clear"] = clear;
  out["codes"] = code_of_number;
  out["scale"] = integers.fine().row_scale * double(packed.scale());
  return out;
}

// Seconds per call of the sweep of one panel over a packed codebook of `size` codes, best of `repeats`.
double time_sweep(int64_t size, int64_t channels, int repeats) {
  const Sweep& sweep = active_sweep();
  const int64_t tiles = (size + sweep.codes_per_tile - 1) / sweep.codes_per_tile;
  std::vector<float> codes(tiles * channels * sweep.codes_per_tile, 0.5f), bias(tiles * sweep.codes_per_tile, 1.0f),
      slope(tiles * sweep.codes_per_tile, 0.0f), panel(channels * sweep.rows, 0.25f), norm(sweep.rows, 1.0f);
  std::vector<float> best(sweep.rows, INFINITY), second(sweep.rows, INFINITY);
  std::vector<int32_t> slot(sweep.rows, 0);
  double fastest = INFINITY;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    sweep.sweep(panel.data(), norm.data(), {codes.data(), bias.data(), slope.data(), channels}, 0, tiles, best.data(),
                second.data(), slot.data());
    fastest = std::min(fastest, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return fastest;
}

// 2^x of the entropy sweeps at the SIMD level in force.
py::array_t<float> exponential(const FloatArray& x) {
  py::array_t<float> y(x.size());
  active_entropy().exponential(x.data(), y.mutable_data(), x.size());
  return y;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "vqkernels: facts about the compiled kernels, and their parts one by one.";
  m.def("simd_level", [] { return level_name(active_level()); }, "The SIMD level in force.");
  m.def("tile", [] { return py::make_tuple(active_sweep().rows, active_sweep().codes_per_tile); },
        "(rows per panel, codes per tile) of the level in force.");
  m.def("filter", &filter, py::arg("rows"), py::arg("codebook"),
        "Lower bounds, thresholds and slots of the certified filter (euclidean, float32).");
  m.def("integer_filter", &integer_filter, py::arg("rows"), py::arg("codebook"),
        "Scores, limits and scale of the integer filters (euclidean, float32); {'usable': False} where they are not used.");
  m.def("time_sweep", &time_sweep, py::arg("size"), py::arg("channels"), py::arg("repeats"),
        "Seconds per sweep of one panel, best of `repeats`.");
  m.def("exponential", &exponential, py::arg("x"), "2^x in float32, as the entropy sweeps compute it.");
  m.def("fma_rate", &fma_rate, py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
        "Float32 multiply-add peak of the calling thread in operations per second, measured for about `seconds`.");
}
