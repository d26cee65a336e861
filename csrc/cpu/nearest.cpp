#include "nearest.h"

#include <math.h>

#include <algorithm>
#include <limits>

namespace vqkernels {
namespace {

constexpr int64_t kBlockBytes = 128 * 1024;  // packed codes swept by every panel of a chunk before the next: half an L2
constexpr int64_t kIntegerChannels = 16;  // below, the float32 sweep is as fast
constexpr int64_t kIntegerRows = 128;     // below, a second packed codebook costs more than it saves
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls f(first tile, last tile, panel) so that a block of codes stays in cache while all panels pass over it.
template <class F> void for_blocks(int64_t tiles, int64_t tile_bytes, int64_t panels, const F& f) {
  const int64_t block = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, tile_bytes));
  for (int64_t first = 0; first < tiles; first += block)
    for (int64_t p = 0; p < panels; ++p) f(first, std::min(first + block, tiles), p);
}

}  // namespace

NearestSearch::NearestSearch(const Rows& rows, const PackedCodebook& codebook, const IntegerCodebook& integers,
                             bool certified)
    : rows_(rows),
      codebook_(codebook),
      integers_(integers),
      sweep_(codebook.sweep),
      certified_(certified),
      use_integers_(certified && integers.usable()) {
  const int64_t padded = (kChunk + sweep_.rows - 1) / sweep_.rows * sweep_.rows;
  zero_.assign(rows.channels, 0.0f);
  panels_.resize(padded * rows.channels);
  for (auto* buffer : {&norm_, &best_, &second_}) buffer->resize(padded);
  slot_.resize(padded);
  if (!use_integers_) return;
  integer_panels_.resize(padded * integers.pairs());
  for (auto* buffer : {&integer_best_, &integer_second_}) buffer->resize(padded);
  for (auto* buffer : {&residual_, &largest_}) buffer->resize(padded);
  square_.resize(padded);
}

// Reads up to rows-per-panel rows, transposed to [channel][row], then centres and scales them. Absent rows are zeros.
void NearestSearch::read_panel(const int64_t* offsets, int64_t count, float* panel, float* norm) {
  const int64_t channels = rows_.channels, stride = rows_.channel_stride, lanes = sweep_.rows;
  with_type(rows_.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    constexpr bool wide = std::is_same<T, double>::value;
    const T* z = static_cast<const T*>(rows_.data);
    // A double row is centred and scaled before its one rounding to float; the others are read as they are.
    const auto read = [&](int64_t at, int64_t d) {
      return wide ? float((double(widen(z[at])) - codebook_.wide_centre()[d]) * double(codebook_.scale()))
                  : float(widen(z[at]));
    };
    if (stride == 1) {
      for (int64_t r = 0; r < count; ++r)
        for (int64_t d = 0; d < channels; ++d) panel[d * lanes + r] = read(offsets[r] + d, d);
    } else {  // channels are apart: neighbouring rows share cache lines, channels do not
      for (int64_t d = 0; d < channels; ++d)
        for (int64_t r = 0; r < count; ++r) panel[d * lanes + r] = read(offsets[r] + d * stride, d);
    }
    // Absent rows become 0 by preparation: no bound is spoiled, and the results are never looked at.
    for (int64_t d = 0; d < channels; ++d)
      for (int64_t r = count; r < lanes; ++r) panel[d * lanes + r] = wide ? 0.0f : codebook_.centre()[d];
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

void NearestSearch::read_panels(const Pending& rows) {
  const int64_t lanes = sweep_.rows;
  for (int64_t p = 0; p < panels(rows); ++p)
    read_panel(&rows.offset[p * lanes], std::min(lanes, rows.size() - p * lanes),
               &panels_[p * lanes * rows_.channels], &norm_[p * lanes]);
}

int64_t NearestSearch::operator()(int64_t begin, int64_t end, const bool* mask, int64_t* index, bool* finite) {
  const int64_t count = end - begin;
  pending_.clear();
  int64_t batch = begin / rows_.positions, position = begin % rows_.positions;
  for (int64_t i = 0; i < count; ++i) {
    finite[i] = true;
    if (mask == nullptr || mask[i]) pending_.add(i, batch * rows_.batch_stride + position * rows_.position_stride);
    else index[i] = kMasked;
    if (++position == rows_.positions) position = 0, ++batch;
  }
  const int64_t unmasked = pending_.size();
  read_panels(pending_);
  if (use_integers_) {
    filter_in_int16(index, finite);
    read_panels(pending_);
  }
  filter_in_float(index, finite);

  std::vector<int64_t> found(open_.size());
  for (int64_t first = 0; first < open_.size(); first += sweep_.rows)
    rescore(&open_.offset[first], &threshold_[first], std::min<int64_t>(sweep_.rows, open_.size() - first),
            &found[first]);
  for (int64_t i = 0; i < open_.size(); ++i) index[open_.row[i]] = found[i];
  return unmasked - open_.size();
}

// Decides what it can of the pending rows; the others stay pending.
void NearestSearch::filter_in_int16(int64_t* index, bool* finite) {
  const int64_t lanes = sweep_.rows, channels = rows_.channels, pairs = integers_.pairs(), count = panels(pending_);
  for (int64_t p = 0; p < count; ++p)
    sweep_.quantize(&panels_[p * lanes * channels], integers_.scale(), channels, &integer_panels_[p * lanes * pairs],
                    &residual_[p * lanes], &square_[p * lanes], &largest_[p * lanes]);
  std::fill(integer_best_.begin(), integer_best_.end(), std::numeric_limits<int32_t>::max());
  std::fill(integer_second_.begin(), integer_second_.end(), std::numeric_limits<int32_t>::max());
  std::fill(slot_.begin(), slot_.end(), 0);
  const int64_t tile_bytes = (pairs + 1) * sweep_.codes_per_tile * int64_t(sizeof(int32_t));
  for_blocks(codebook_.tile_count(), tile_bytes, count, [&](int64_t first, int64_t last, int64_t p) {
    sweep_.sweep16(&integer_panels_[p * lanes * pairs], integers_.tiles(), first, last, &integer_best_[p * lanes],
                   &integer_second_[p * lanes], &slot_[p * lanes]);
  });
  open_.clear();
  for (int64_t i = 0; i < pending_.size(); ++i) {
    const int64_t row = pending_.row[i];
    if (integers_.fits(largest_[i], norm_[i]) &&
        double(integer_second_[i]) > integers_.threshold(integer_best_[i], norm_[i], residual_[i], square_[i])) {
      index[row] = codebook_.index(slot_[i]);
    } else if (!(norm_[i] < kInfinity) && !row_is_finite(pending_.offset[i])) {
      finite[row] = false;
      index[row] = 0;
    } else {
      open_.add(row, pending_.offset[i]);
    }
  }
  // Data on which this filter decides little costs one chunk per task, not two sweeps for every row.
  use_integers_ = open_.size() * 10 < pending_.size() * 3;
  std::swap(pending_, open_);
}

// Decides what it can of the pending rows; the others are left in open_, with their thresholds.
void NearestSearch::filter_in_float(int64_t* index, bool* finite) {
  const int64_t lanes = sweep_.rows, channels = rows_.channels;
  open_.clear();
  threshold_.clear();
  if (pending_.size() == 0) return;
  std::fill(best_.begin(), best_.end(), kInfinity);
  std::fill(second_.begin(), second_.end(), kInfinity);
  std::fill(slot_.begin(), slot_.end(), 0);
  const int64_t tile_bytes = channels * sweep_.codes_per_tile * int64_t(sizeof(float));
  for_blocks(codebook_.tile_count(), tile_bytes, panels(pending_), [&](int64_t first, int64_t last, int64_t p) {
    sweep_.sweep(&panels_[p * lanes * channels], &norm_[p * lanes], codebook_.tiles(), first, last, &best_[p * lanes],
                 &second_[p * lanes], &slot_[p * lanes]);
  });
  for (int64_t i = 0; i < pending_.size(); ++i) {
    const int64_t row = pending_.row[i];
    // A finite row can still have an infinite norm, so only such rows are read again.
    if (!(norm_[i] < kInfinity) && !row_is_finite(pending_.offset[i])) {
      finite[row] = false;
      index[row] = 0;
      continue;
    }
    index[row] = codebook_.size() > 0 ? codebook_.index(slot_[i]) : 0;
    if (!certified_ || codebook_.size() <= 1) continue;
    const float threshold = codebook_.threshold(best_[i], norm_[i], slot_[i]);
    if (second_[i] > threshold) continue;
    open_.add(row, pending_.offset[i]);
    threshold_.push_back(threshold);
  }
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

// The norm of a large row, centred and scaled, among up to 1024 unmasked ones.
static double typical_row_norm(const Rows& rows, const PackedCodebook& codebook, const bool* mask) {
  constexpr int64_t kSamples = 1024;
  constexpr double kMargin = 1.3;  // rows beyond it go to the float32 filter
  const int64_t step = std::max<int64_t>(1, rows.count() / kSamples);
  double largest = 0.0;
  with_type(rows.dtype, [&](auto* type) {
    for (int64_t row = 0; row < rows.count(); row += step) {
      if (mask != nullptr && !mask[row]) continue;
      const auto* x = static_cast<decltype(type)>(rows.data) + rows.offset(row);
      double square = 0.0;
      for (int64_t d = 0; d < rows.channels; ++d) {
        const double a = (double(widen(x[d * rows.channel_stride])) - codebook.wide_centre()[d]) * codebook.scale();
        square += a * a;
      }
      if (square < 0x1p120) largest = std::max(largest, square);  // not of a row that no filter could take
    }
  });
  return kMargin * sqrt(largest);
}

IntegerCodebook integer_codebook(const Rows& rows, const PackedCodebook& codebook, const bool* mask, bool certified) {
  const bool worth_it = certified && codebook.sweep.sweep16 != nullptr && rows.channels >= kIntegerChannels &&
                        rows.count() >= kIntegerRows;
  return IntegerCodebook(codebook, worth_it ? typical_row_norm(rows, codebook, mask) : double(NAN));
}

}  // namespace vqkernels
