#include "nearest.h"

#include <math.h>

#include <algorithm>
#include <limits>
#include <type_traits>

namespace vqkernels {
namespace {

constexpr int64_t kBlockBytes = 128 * 1024;  // packed codes swept by every panel of a chunk before the next: half an L2
constexpr int64_t kIntegerRows = 32;         // below, a second packed codebook costs more than it saves
constexpr int64_t kMostLanes = 32;           // rows of the widest panel
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls f(first tile, last tile, panel) so that a block of codes stays in cache while all panels pass over it.
template <class F> void for_blocks(int64_t tiles, int64_t tile_bytes, int64_t panels, const F& f) {
  const int64_t block = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, tile_bytes));
  for (int64_t first = 0; first < tiles; first += block)
    for (int64_t p = 0; p < panels; ++p) f(first, std::min(first + block, tiles), p);
}

bool neighbours(const int64_t* offsets, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    if (offsets[i] != offsets[i - 1] + 1) return false;
  return true;
}

}  // namespace

NearestSearch::NearestSearch(const Rows& rows, const PackedCodebook& codebook, const IntegerCodebook& integers,
                             bool certified)
    : rows_(rows), codebook_(codebook), integers_(integers), sweep_(codebook.sweep), certified_(certified) {
  const int64_t padded = (kChunk + sweep_.rows - 1) / sweep_.rows * sweep_.rows;
  for (auto* buffer : {&norm_, &best_, &second_}) buffer->resize(padded);
  slot_.resize(padded);
  zero_.assign(rows.channels, 0.0f);
  if (certified && integers.usable())
    integer_filter_ = std::make_unique<IntegerFilter>(codebook, integers, std::min(kChunk, rows.count()));
}

// Reads up to rows-per-panel rows, transposed to [channel][row], zeros where there is no row.
void NearestSearch::read_panel(const int64_t* offsets, int64_t count, float* panel) {
  const int64_t channels = rows_.channels, stride = rows_.channel_stride, lanes = sweep_.rows;
  if (rows_.dtype == DType::f32 && stride == 1) {
    const int32_t* at[kMostLanes];
    for (int64_t r = 0; r < count; ++r) at[r] = static_cast<const int32_t*>(rows_.data) + offsets[r];
    sweep_.transpose(at, count, channels, reinterpret_cast<int32_t*>(panel), lanes);
    return;
  }
  for (int64_t d = 0; count < lanes && d < channels; ++d)
    std::fill(panel + d * lanes + count, panel + (d + 1) * lanes, 0.0f);
  if (rows_.dtype == DType::f32 && neighbours(offsets, count)) {
    const float* z = static_cast<const float*>(rows_.data) + offsets[0];
    for (int64_t d = 0; d < channels; ++d) std::copy(z + d * stride, z + d * stride + count, panel + d * lanes);
    return;
  }
  with_type(rows_.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const T* z = static_cast<const T*>(rows_.data);
    // A double row is centred and scaled before its one rounding to float; the others are read as they are.
    const auto read = [&](int64_t at, int64_t d) {
      if constexpr (std::is_same<T, double>::value)
        return float((z[at] - codebook_.wide_centre()[d]) * double(codebook_.scale()));
      else return widen(z[at]);
    };
    if (stride == 1) {
      for (int64_t r = 0; r < count; ++r)
        for (int64_t d = 0; d < channels; ++d) panel[d * lanes + r] = read(offsets[r] + d, d);
    } else {  // channels are apart: neighbouring rows share cache lines, channels do not
      for (int64_t d = 0; d < channels; ++d)
        for (int64_t r = 0; r < count; ++r) panel[d * lanes + r] = read(offsets[r] + d * stride, d);
    }
  });
}

// Reads rows as panels, centred and scaled, with their norms.
void NearestSearch::read_panels(const Pending& rows) {
  const int64_t lanes = sweep_.rows, channels = rows_.channels;
  const bool centred = rows_.dtype == DType::f64;
  if (int64_t(panels_.size()) < panels(rows) * lanes * channels) panels_.resize(panels(rows) * lanes * channels);
  for (int64_t first = 0; first < rows.size(); first += lanes) {
    float* panel = &panels_[first * channels];
    read_panel(&rows.offset[first], std::min(lanes, rows.size() - first), panel);
    sweep_.prepare(panel, centred ? zero_.data() : codebook_.centre(), centred ? 1.0f : codebook_.scale(), channels,
                   &norm_[first]);
  }
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
  contracted_ = 0;
  read_panels(pending_);
  if (integer_filter_ != nullptr && integer_filter_->active()) filter_in_integers(index, finite);
  filter_in_float(index, finite);

  std::vector<int64_t> found(open_.size());
  for (int64_t first = 0; first < open_.size(); first += sweep_.rows)
    rescore(&open_.offset[first], &threshold_[first], std::min<int64_t>(sweep_.rows, open_.size() - first),
            &found[first]);
  for (int64_t i = 0; i < open_.size(); ++i) index[open_.row[i]] = found[i];
  return unmasked - open_.size() - contracted_;
}

// Decides what it can of the pending rows; the others stay pending.
void NearestSearch::filter_in_integers(int64_t* index, bool* finite) {
  const IntegerFilter::Row* rows = (*integer_filter_)(panels_.data(), norm_.data(), pending_.size());
  open_.clear();
  for (int64_t i = 0; i < pending_.size(); ++i) {
    const int64_t row = pending_.row[i];
    if (rows[i].count == 1) {
      index[row] = codebook_.index(integers_.slot(rows[i].survivors[0]));
    } else if (rows[i].count > 1) {
      index[row] = contract_winner(pending_.offset[i], rows[i].survivors, rows[i].count);
      ++contracted_;
    } else if (!(norm_[i] < kInfinity) && !row_is_finite(pending_.offset[i])) {
      finite[row] = false;
      index[row] = 0;
    } else {
      open_.add(row, pending_.offset[i]);
    }
  }
  std::swap(pending_, open_);
  read_panels(pending_);
}

// The contract for one row over a few codes, ascending: the lowest index wins a tie.
int64_t NearestSearch::contract_winner(int64_t offset, const int32_t* survivors, int32_t count) {
  wide_row_.resize(rows_.channels);
  wide_code_.resize(rows_.channels);
  with_type(rows_.dtype, [&](auto* type) {
    const auto* row = static_cast<decltype(type)>(rows_.data) + offset;
    for (int64_t d = 0; d < rows_.channels; ++d) wide_row_[d] = double(widen(row[d * rows_.channel_stride]));
  });
  double lowest = std::numeric_limits<double>::infinity();
  int64_t index = codebook_.index(integers_.slot(survivors[0]));
  for (int32_t i = 0; i < count; ++i) {
    const int32_t slot = integers_.slot(survivors[i]);
    codebook_.widen_code(slot, wide_code_.data());
    double score = 0.0;
    if (codebook_.metric == Metric::euclidean) {
      for (int64_t d = 0; d < rows_.channels; ++d) {
        const double difference = wide_row_[d] - wide_code_[d];
        score += difference * difference;
      }
    } else {
      for (int64_t d = 0; d < rows_.channels; ++d) score -= wide_row_[d] * wide_code_[d];
    }
    if (codebook_.metric == Metric::cosine) {
      const double norm = codebook_.contract_norm(wide_code_.data());
      score = norm > 0.0 ? score / norm : 0.0;
    }
    if (score < lowest) lowest = score, index = codebook_.index(slot);
  }
  return index;
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
  Pending panel;
  for (int64_t r = 0; r < count; ++r) panel.add(r, offsets[r]);
  read_panels(panel);
  const int64_t survivors =
      sweep_.sift(panels_.data(), norm_.data(), codebook_.tiles(), codebook_.size(), limit.data(), survivors_.data());
  with_type(rows_.dtype, [&](auto* type) {
    for (int64_t r = 0; r < count; ++r) {
      const auto* row = static_cast<decltype(type)>(rows_.data) + offsets[r];
      for (int64_t d = 0; d < channels; ++d) wide_panel_[d * lanes + r] = double(widen(row[d * rows_.channel_stride]));
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

// The norm of a large row, centred and scaled, among some unmasked ones, rounded up to a power of 2^(1/4): calls on the
// same kind of data choose the same scales.
static double typical_row_norm(const Rows& rows, const PackedCodebook& codebook, const bool* mask) {
  constexpr int64_t kSamples = 128;
  constexpr double kMargin = 1.2;  // rows beyond it go to the float32 filter
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
  return largest > 0.0 ? exp2(ceil(4.0 * log2(kMargin * sqrt(largest))) / 4.0) : 0.0;
}

double integer_row_norm(const Rows& rows, const PackedCodebook& codebook, const bool* mask, bool certified) {
  const bool worth_it = certified && codebook.sweep.integers != nullptr && rows.count() >= kIntegerRows;
  return worth_it ? typical_row_norm(rows, codebook, mask) : double(NAN);
}

}  // namespace vqkernels
