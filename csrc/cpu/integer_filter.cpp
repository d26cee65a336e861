#include "integer_filter.h"

#include <algorithm>
#include <limits>

namespace vqkernels {
namespace {

constexpr int32_t kHighest = std::numeric_limits<int32_t>::max(), kLowest = std::numeric_limits<int32_t>::min();
constexpr int64_t kBlockTiles = 8192;  // whose minima are kept at once: 1 MB at the widest panel
constexpr int64_t kCoarseWork = 8192;  // K D from which two steps beat one
constexpr int64_t kEnoughRows = 64;    // to judge by; a quarter of them left open is enough, too

// Candidate tiles are scattered over the codebook: asked for one ahead, they arrive while the one before is scored.
inline void prefetch(const int32_t* begin, int64_t words) {
  for (int64_t w = 0; w < words; w += 16) __builtin_prefetch(begin + w);
}

}  // namespace

IntegerFilter::IntegerFilter(const PackedCodebook& codebook, const IntegerCodebook& integers, int64_t most_rows)
    : codebook_(codebook),
      integers_(integers),
      kernels_(*codebook.sweep.integers),
      lanes_(codebook.sweep.rows),
      plain_words_((integers.pairs() + lanes_ - 1) / lanes_ * lanes_),
      mode_(integers.has_coarse() && integers.size() * codebook.source.channels > kCoarseWork ? Mode::coarse
                                                                                              : Mode::fine) {
  fine_.resize(lanes_ * 2 * integers.quads());
  if (integers.has_coarse()) coarse_.resize(lanes_ * integers.quads());
  plain_.resize(lanes_ * plain_words_);
  residual_.resize(lanes_);
  coarse_residual_.resize(lanes_);
  const int64_t tiles = std::min(kBlockTiles, integers.tile_count());
  lowest_.resize(tiles * lanes_);
  for (auto* buffer : {&number_, &value_}) buffer->resize(tiles * lanes_ + lanes_);
  candidates_.resize(lanes_);
  begin_.resize(lanes_ + 1);
  survivors_.resize(most_rows * kMostSurvivors);
  rows_.resize(most_rows);
}

const IntegerFilter::Row* IntegerFilter::operator()(const float* panels, const float* norm, int64_t count) {
  for (int64_t at = 0; at < count; at += lanes_) {
    const int64_t some = std::min(lanes_, count - at);
    if (mode_ == Mode::off) {
      std::fill_n(&rows_[at], some, Row{0, nullptr});
      continue;
    }
    const Pass pass = mode_ == Mode::coarse
                          ? Pass{integers_.coarse_tiles(), &integers_.coarse(), kernels_.sweep_coarse,
                                 kernels_.pick_coarse,     coarse_.data(),      coarse_residual_.data()}
                          : Pass{integers_.fine_tiles(), &integers_.fine(), kernels_.sweep_fine,
                                 kernels_.pick_fine,     fine_.data(),      residual_.data()};
    kernels_.round(panels + at * codebook_.source.channels, integers_.fine().row_scale, integers_.coarse().row_scale,
                   codebook_.source.channels, fine_.data(), mode_ == Mode::coarse ? coarse_.data() : nullptr,
                   residual_.data(), coarse_residual_.data());
    sweep_panel(pass, norm + at, some);
    finish_panel(pass, norm + at, some, at);
    choose_mode(some);
  }
  return rows_.data();
}

// Forgets the tiles that a better row minimum, found since, has ruled out.
void IntegerFilter::Candidates::drop_above(int32_t limit) {
  int32_t kept = 0;
  for (int32_t j = 0; j < count; ++j)
    if (lowest[j] <= limit) tile[kept] = tile[j], lowest[kept++] = lowest[j];
  count = kept;
}

// Sweeps all tiles with one panel and lists, for each of its rows, the tiles whose lowest score is within the
// threshold: at once where their minima fit the buffer, otherwise block by block with the threshold known by then.
// Codes are read once a panel, 2 bytes a cycle: any cache level has that, so they are not blocked.
void IntegerFilter::sweep_panel(const Pass& pass, const float* norm, int64_t count) {
  std::fill_n(best_, lanes_, kHighest);
  for (int64_t i = 0; i < count; ++i) candidates_[i].count = 0;
  for (int64_t first = 0; first < integers_.tile_count(); first += kBlockTiles) {
    const int64_t last = std::min(first + kBlockTiles, integers_.tile_count());
    pass.sweep(pass.panel, pass.tiles, first, last, lowest_.data(), best_);
    kernels_.limits(*pass.certificate, best_, norm, pass.residual, limit_);
    for (int64_t i = 0; i < lanes_; ++i)  // rows that are not there, or cannot be filtered, have no candidates
      if (i >= count || !integers_.fits(norm[i])) limit_[i] = kLowest;
    const int64_t found = kernels_.scan(lowest_.data(), last - first, limit_, number_.data(), value_.data());
    for (int64_t i = 0; i < found; ++i) {
      const int64_t lane = number_[i] % lanes_;
      Candidates& list = candidates_[lane];
      if (list.count == kMostTiles) list.drop_above(limit_[lane]);
      if (list.count >= kMostTiles) {
        list.count = kMostTiles + 1;
        continue;
      }
      list.tile[list.count] = int32_t(first + number_[i] / lanes_);
      list.lowest[list.count++] = value_[i];
    }
  }
}

// Finds the codes within the threshold in the candidate tiles of a panel's rows; after a coarse sweep, those of them
// within the fine threshold. `at` is the panel's first row in the chunk.
void IntegerFilter::finish_panel(const Pass& pass, const float* norm, int64_t count, int64_t at) {
  const int64_t per_tile = codebook_.sweep.codes_per_tile, tile_words = (pass.tiles.words + 1) * per_tile;
  const int64_t most = std::min(kMostTiles, 8 + integers_.tile_count() / 4);  // beyond, the next filter is cheaper
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    begin_[i] = int32_t(total);
    Candidates& list = candidates_[i];
    if (list.count > kMostTiles || limit_[i] == kHighest ||
        !integers_.clear_of_aside(*pass.certificate, best_[i], norm[i], pass.residual[i]))
      continue;
    if (integers_.tile_count() > kBlockTiles) list.drop_above(limit_[i]);
    if (list.count > most) continue;
    picked_ += list.count;
    if (int64_t(codes_.size()) < total + list.count * per_tile) codes_.resize(2 * (total + list.count * per_tile));
    for (int32_t j = 0; j < list.count; ++j) {
      if (j + 1 < list.count) prefetch(&pass.tiles.codes[list.tile[j + 1] * tile_words], tile_words);
      total += pass.pick(pass.panel + i, pass.tiles, list.tile[j], limit_[i], codes_.data() + total);
    }
  }
  begin_[count] = int32_t(total);
  if (mode_ == Mode::coarse && total > count) score_finely(norm, count);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t found = begin_[i + 1] - begin_[i];
    int32_t* survivors = &survivors_[(at + i) * kMostSurvivors];
    if (found <= kMostSurvivors) std::copy(codes_.data() + begin_[i], codes_.data() + begin_[i + 1], survivors);
    rows_[at + i] = {found <= kMostSurvivors ? found : 0, survivors};
    unsettled_ += rows_[at + i].count != 1;
  }
}

// Keeps, of the candidate codes of a panel's rows, those within the fine threshold.
void IntegerFilter::score_finely(const float* norm, int64_t count) {
  const int64_t pairs = integers_.pairs(), total = begin_[count];
  const int32_t* line[kMostLanes];
  for (int64_t first = 0; first < pairs; first += lanes_) {
    const int64_t some = std::min(lanes_, pairs - first);
    for (int64_t w = 0; w < some; ++w) line[w] = &fine_[(first + w) * lanes_];
    codebook_.sweep.transpose(line, some, lanes_, plain_.data() + first, plain_words_);
  }
  if (int64_t(scores_.size()) < total) scores_.resize(2 * total);
  std::fill_n(best_, lanes_, kHighest);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t found = begin_[i + 1] - begin_[i];
    if (found > 1)
      best_[i] = kernels_.score(reinterpret_cast<const int16_t*>(&plain_[i * plain_words_]), integers_.codes(),
                                integers_.bias(), integers_.stride(), &codes_[begin_[i]], found, &scores_[begin_[i]]);
  }
  kernels_.limits(integers_.fine(), best_, norm, residual_.data(), limit_);
  int32_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t first = begin_[i], last = begin_[i + 1];
    begin_[i] = kept;
    for (int32_t j = first; j < last; ++j)
      if (last - first == 1 || scores_[j] <= limit_[i]) codes_[kept++] = codes_[j];
  }
  begin_[count] = kept;
}

// Judges by all rows so far: data on which a filter decides little cost a chunk, not one sweep more for every row.
void IntegerFilter::choose_mode(int64_t count) {
  rows_seen_ += count;
  const int64_t channels = codebook_.source.channels;
  if (rows_seen_ < kEnoughRows && unsettled_ < kEnoughRows / 4) return;
  // In cycles: the int16 sweep costs K D / 32 a row, the int8 sweep half of that; a candidate tile about D + 30.
  const bool dear = (picked_ - rows_seen_) * (channels + 30) > rows_seen_ * integers_.size() * channels / 64;
  if (mode_ == Mode::coarse && (dear || unsettled_ * 10 > rows_seen_)) {
    mode_ = Mode::fine;
    rows_seen_ = picked_ = unsettled_ = 0;
  } else if (mode_ == Mode::fine && unsettled_ * 10 > rows_seen_ * 3) {
    mode_ = Mode::off;
  }
}

}  // namespace vqkernels
