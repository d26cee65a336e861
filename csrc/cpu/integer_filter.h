// The integer filters over one chunk of rows: int8 sweep where it pays, int16 scores of the few tiles that survive it.
//
// Fused: rounding, scores, tile minima, certificate. Never built: scores of a whole row; a sweep writes one minimum per
// row of a panel and tile of codes, at most 1 MB of them, and only the tiles within the threshold are scored again,
// code by code. Ties: survivors are ascending, and the contract decides between them. Why it is right: codebook16.h.
#pragma once
#include <stdint.h>

#include <vector>

#include "codebook16.h"

namespace vqkernels {

class IntegerFilter {
 public:
  IntegerFilter(const PackedCodebook& codebook, const IntegerCodebook& integers, int64_t most_rows);

  // False where there is nothing to filter with, or once the data has shown that the filter decides too little.
  bool active() const { return mode_ != Mode::off; }

  // What became of a row: the numbers (of IntegerCodebook) of the codes that can still win, ascending; none: it is
  // open.
  struct Row {
    int32_t count;
    const int32_t* survivors;
  };

  // Filters `count` rows in prepared panels, [channel][row], with their norms; valid until the next call.
  const Row* operator()(const float* panels, const float* norm, int64_t count);

  static constexpr int32_t kMostSurvivors = 8;

 private:
  enum class Mode { coarse, fine, off };
  static constexpr int64_t kMostLanes = 32;   // rows of the widest panel
  static constexpr int64_t kMostTiles = 384;  // candidate tiles of one row; a row with more is left open

  struct Candidates {
    int32_t count;  // kMostTiles + 1: too many
    int32_t tile[kMostTiles], lowest[kMostTiles];
    void drop_above(int32_t limit);
  };

  // What differs between the sweeps.
  struct Pass {
    IntegerTiles tiles;
    const Certificate* certificate;
    decltype(IntegerKernels::sweep_fine) sweep;
    decltype(IntegerKernels::pick_fine) pick;
    const int32_t* panel;
    const float* residual;
  };

  void sweep_panel(const Pass& pass, const float* norm, int64_t count);
  void finish_panel(const Pass& pass, const float* norm, int64_t count, int64_t at);
  void score_finely(const float* norm, int64_t count);
  void choose_mode(int64_t count);

  const PackedCodebook& codebook_;
  const IntegerCodebook& integers_;
  const IntegerKernels& kernels_;
  const int64_t lanes_, plain_words_;  // rows of a panel; words between its plain rows
  Mode mode_;
  int64_t rows_seen_ = 0, picked_ = 0,
          unsettled_ = 0;  // in this mode: rows, candidate tiles, rows without one survivor
  // Of one panel: its rounded rows, in words and plain; the lowest score of each tile; what was found.
  std::vector<int32_t> fine_, coarse_, plain_, lowest_, number_, value_;
  std::vector<float> residual_, coarse_residual_;
  int32_t best_[kMostLanes], limit_[kMostLanes];
  std::vector<Candidates> candidates_;
  std::vector<int32_t> begin_, codes_, scores_;  // each row's candidate codes, and their fine scores
  // Of the chunk.
  std::vector<int32_t> survivors_;
  std::vector<Row> rows_;
};

}  // namespace vqkernels
