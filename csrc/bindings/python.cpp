// The optional module vqkernels._C: information, and the inner kernels one by one for tests and micro-benchmarks.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <vector>

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

// Integer scores F (rows, distinct codes), thresholds T, whether each row fits, and the whole scale S of the int16 filter.
py::dict integer_filter(const FloatArray& rows, const FloatArray& codebook) {
  const Sweep& sweep = active_sweep();
  const int64_t n = rows.shape(0), channels = rows.shape(1);
  const Rows view{rows.data(), DType::f32, 1, n, channels, 0, channels, 1};
  const PackedCodebook packed({codebook.data(), DType::f32, codebook.shape(0), channels}, DType::f32, Metric::euclidean,
                              true, sweep);
  py::dict out;
  const IntegerCodebook integers = integer_codebook(view, packed, nullptr, true);
  out["usable"] = integers.usable();
  if (!integers.usable()) return out;
  const int64_t pairs = integers.pairs(), per_tile = sweep.codes_per_tile;
  py::array_t<int64_t> scores({n, packed.size()});
  py::array_t<double> thresholds(n);
  py::array_t<bool> fits(n);
  std::vector<int64_t> code_of_slot(packed.size());
  for (int64_t slot = 0; slot < packed.size(); ++slot) code_of_slot[slot] = packed.index(int32_t(slot));
  std::vector<float> panel(channels * sweep.rows), norm(sweep.rows), residual(sweep.rows), largest(sweep.rows);
  std::vector<uint32_t> square(sweep.rows);
  std::vector<int32_t> words(pairs * sweep.rows), one((pairs + 1) * per_tile), best(sweep.rows), second(sweep.rows),
      at(sweep.rows);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < channels; ++d) std::fill_n(&panel[d * sweep.rows], sweep.rows, rows.at(i, d));
    sweep.prepare(panel.data(), packed.centre(), packed.scale(), channels, norm.data());
    sweep.quantize(panel.data(), integers.scale(), channels, words.data(), residual.data(), square.data(),
                   largest.data());
    int32_t lowest = INT32_MAX;
    for (int64_t k = 0; k < packed.size(); ++k) {  // one code at a time: a tile whose other codes are padding
      const int32_t* tile = integers.tiles().codes + (k / per_tile) * (pairs + 1) * per_tile;
      std::fill(one.begin(), one.end(), 0);
      std::fill_n(one.begin(), per_tile, INT32_MAX);
      for (int64_t row = 0; row <= pairs; ++row) one[row * per_tile] = tile[row * per_tile + k % per_tile];
      std::fill(best.begin(), best.end(), INT32_MAX);
      std::fill(second.begin(), second.end(), INT32_MAX);
      sweep.sweep16(words.data(), {one.data(), pairs}, 0, 1, best.data(), second.data(), at.data());
      scores.mutable_at(i, k) = best[0];
      lowest = std::min(lowest, best[0]);
    }
    fits.mutable_at(i) = integers.fits(largest[0], norm[0]);
    thresholds.mutable_at(i) = integers.threshold(lowest, norm[0], residual[0], square[0]);
  }
  out["scores"] = scores;
  out["thresholds"] = thresholds;
  out["fits"] = fits;
  out["code_of_slot"] = code_of_slot;
  out["scale"] = double(integers.scale()) * double(packed.scale());
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "vqkernels: facts about the compiled kernels, and their parts one by one.";
  m.def("simd_level", [] { return level_name(active_level()); }, "The SIMD level in force.");
  m.def("tile", [] { return py::make_tuple(active_sweep().rows, active_sweep().codes_per_tile); },
        "(rows per panel, codes per tile) of the level in force.");
  m.def("filter", &filter, py::arg("rows"), py::arg("codebook"),
        "Lower bounds, thresholds and slots of the certified filter (euclidean, float32).");
  m.def("integer_filter", &integer_filter, py::arg("rows"), py::arg("codebook"),
        "Scores, thresholds and scale of the int16 filter (euclidean, float32); {'usable': False} where it is not used.");
  m.def("time_sweep", &time_sweep, py::arg("size"), py::arg("channels"), py::arg("repeats"),
        "Seconds per sweep of one panel, best of `repeats`.");
  m.def("fma_rate", &fma_rate, py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
        "Float32 multiply-add peak of the calling thread in operations per second, measured for about `seconds`.");
}
