#include "nearest.h"

#include <math.h>

#include <algorithm>
#include <limits>

namespace vqkernels {
namespace {

constexpr int64_t kBlockBytes = 128 * 1024;  // packed codes swept by every panel of a chunk before the next: half an L2
constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

NearestSearch::NearestSearch(const Rows& rows, const PackedCodebook& codebook, bool certified)
    : rows_(rows), codebook_(codebook), sweep_(codebook.sweep), certified_(certified) {
  const int64_t padded = (kChunk + sweep_.rows - 1) / sweep_.rows * sweep_.rows;
  zero_.assign(rows.channels, 0.0f);
  panels_.resize(padded * rows.channels);
  norm_.resize(padded);
  best_.resize(padded);
  second_.resize(padded);
  slot_.resize(padded);
  offset_.resize(kChunk);
}

void NearestSearch::read_offsets(int64_t begin, int64_t count, const bool* mask) {
  int64_t batch = begin / rows_.positions, position = begin % rows_.positions;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t offset = batch * rows_.batch_stride + position * rows_.position_stride;
    offset_[i] = mask == nullptr || mask[i] ? offset : kMasked;
    if (++position == rows_.positions) position = 0, ++batch;
  }
}

// Reads up to rows-per-panel rows, transposed to [channel][row], then centres and scales them. Absent rows are zeros.
void NearestSearch::read_panel(const int64_t* offsets, int64_t count, float* panel, float* norm) {
  const int64_t channels = rows_.channels, stride = rows_.channel_stride, lanes = sweep_.rows;
  with_type(rows_.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    constexpr bool wide = std::is_same<T, double>::value;
    for (int64_t r = 0; r < lanes; ++r) {
      if (r >= count || offsets[r] == kMasked) {
        // After preparation these become 0: no bound is spoiled, and the results are never looked at.
        for (int64_t d = 0; d < channels; ++d) panel[d * lanes + r] = wide ? 0.0f : codebook_.centre()[d];
        continue;
      }
      const T* row = static_cast<const T*>(rows_.data) + offsets[r];
      for (int64_t d = 0; d < channels; ++d) {
        const auto x = widen(row[d * stride]);
        // A double row is centred and scaled before its one rounding to float; the others subtract exactly enough.
        panel[d * lanes + r] = wide ? float((double(x) - codebook_.wide_centre()[d]) * double(codebook_.scale()))
                                    : float(x);
      }
    }
    sweep_.prepare(panel, wide ? zero_.data() : codebook_.centre(), wide ? 1.0f : codebook_.scale(), channels, norm);
  });
}

bool NearestSearch::row_is_finite(int64_t offset) const {
  return with_type(rows_.dtype, [&](auto* type) {
    const auto* row = static_cast<decltype(type)>(rows_.data) + offset;
    for (int64_t d = 0; d < rows_.channels; ++d)
      if (!isfinite(widen(row[d * rows_.channel_stride]))) return false;
    return true;
  });
}

int64_t NearestSearch::operator()(int64_t begin, int64_t end, const bool* mask, int64_t* index, bool* finite) {
  const int64_t count = end - begin, lanes = sweep_.rows, channels = rows_.channels;
  const int64_t panels = (count + lanes - 1) / lanes;
  const Tiles tiles = codebook_.tiles();
  read_offsets(begin, count, mask);
  for (int64_t p = 0; p < panels; ++p)
    read_panel(&offset_[p * lanes], std::min(lanes, count - p * lanes), &panels_[p * lanes * channels],
               &norm_[p * lanes]);

  std::fill(best_.begin(), best_.end(), kInfinity);
  std::fill(second_.begin(), second_.end(), kInfinity);
  std::fill(slot_.begin(), slot_.end(), 0);
  const int64_t tile_bytes = channels * sweep_.codes_per_tile * int64_t(sizeof(float));
  const int64_t block = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, tile_bytes));
  for (int64_t first = 0; first < codebook_.tile_count(); first += block)
    for (int64_t p = 0; p < panels; ++p)
      sweep_.sweep(&panels_[p * lanes * channels], &norm_[p * lanes], tiles, first,
                   std::min(first + block, codebook_.tile_count()), &best_[p * lanes], &second_[p * lanes],
                   &slot_[p * lanes]);

  int64_t decided = 0;
  open_row_.clear();
  open_offset_.clear();
  open_threshold_.clear();
  for (int64_t i = 0; i < count; ++i) {
    finite[i] = true;
    if (offset_[i] == kMasked) {
      index[i] = kMasked;
      continue;
    }
    ++decided;
    // A finite row can still have an infinite norm, so only such rows are read again.
    if (!(norm_[i] < kInfinity) && !row_is_finite(offset_[i])) {
      finite[i] = false;
      index[i] = 0;
      continue;
    }
    index[i] = codebook_.size() > 0 ? codebook_.index(slot_[i]) : 0;
    if (!certified_ || codebook_.size() <= 1) continue;
    const float threshold = codebook_.threshold(best_[i], norm_[i], slot_[i]);
    if (second_[i] > threshold) continue;
    --decided;
    open_row_.push_back(i);
    open_offset_.push_back(offset_[i]);
    open_threshold_.push_back(threshold);
  }

  const int64_t open = int64_t(open_row_.size());
  open_index_.resize(open);
  for (int64_t first = 0; first < open; first += lanes)
    rescore(&open_offset_[first], &open_threshold_[first], std::min(lanes, open - first), &open_index_[first]);
  for (int64_t i = 0; i < open; ++i) index[open_row_[i]] = open_index_[i];
  return decided;
}

// The contract over the survivors of one panel of undecided rows. A code that survives for one row is scored for all of
// them, which is exact for every row: a row's minimum over any set that holds all its own survivors is its answer.
void NearestSearch::rescore(const int64_t* offsets, const float* thresholds, int64_t count, int64_t* index) {
  const int64_t channels = rows_.channels, lanes = sweep_.rows;
  survivors_.resize(codebook_.size() + 1);
  wide_panel_.assign(channels * lanes, 0.0);
  wide_code_.resize(channels);
  score_.resize(lanes);
  wide_best_.assign(lanes, std::numeric_limits<double>::infinity());

  std::vector<float> limit(lanes, -kInfinity);
  std::copy(thresholds, thresholds + count, limit.begin());
  read_panel(offsets, count, panels_.data(), norm_.data());
  const int64_t survivors =
      sweep_.sift(panels_.data(), norm_.data(), codebook_.tiles(), codebook_.size(), limit.data(), survivors_.data());
  with_type(rows_.dtype, [&](auto* type) {
    for (int64_t r = 0; r < count; ++r) {
      const auto* row = static_cast<decltype(type)>(rows_.data) + offsets[r];
      for (int64_t d = 0; d < channels; ++d)
        wide_panel_[d * lanes + r] = double(widen(row[d * rows_.channel_stride]));
    }
  });
  std::fill(index, index + count, codebook_.index(0));
  for (int64_t i = 0; i < survivors; ++i) {
    codebook_.widen_code(survivors_[i], wide_code_.data());
    sweep_.contract(wide_panel_.data(), wide_code_.data(), channels, codebook_.metric == Metric::euclidean,
                    score_.data());
    const double norm = codebook_.metric == Metric::cosine ? codebook_.contract_norm(wide_code_.data()) : 1.0;
    for (int64_t r = 0; r < count; ++r) {
      const double score = codebook_.metric != Metric::cosine ? score_[r] : norm > 0.0 ? score_[r] / norm : 0.0;
      if (score < wide_best_[r]) {
        wide_best_[r] = score;
        index[r] = codebook_.index(survivors_[i]);
      }
    }
  }
}

}  // namespace vqkernels
