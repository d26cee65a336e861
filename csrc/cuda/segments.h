// Deterministic sums of rows by code, as block programs: row keys, borders, chunk sums, totals.
//
// The key of a row is head * codes + index, and heads * codes for a row that counts nowhere: masked, of an index
// outside the codebook, or holding a NaN or an infinity. A stable sort by key (statistics.cu) puts the rows of one code
// together, ascending. The sorted rows are cut into chunks of kChunk; within one, runs of equal keys are added up, row
// after row. A run that is a whole segment is written straight to its sum. The others leave a partial: one that began
// in an earlier chunk at 2 * chunk, one that begins in this chunk and goes on at 2 * chunk + 1. The total of a segment
// over several chunks adds its partials in chunk order. Who adds what, in which order, depends on the keys alone, so
// every bit repeats on every GPU; there are no atomics, and one code with all the rows costs what many codes do.
// Never materialised: a permuted copy of z, a one-hot matrix, z - e. Traffic: keys read z once to find what is not
// finite, sums read it once more, gathered; the partials, at most 2 D float64 per chunk, are written and read once.
// Sums run in float64 and are rounded once. With a codebook the sum is of e - z, without the cancellation of n e - sum
// z, times 2 grad / elements: the gradient of the mean squared distance.
#pragma once
#include "rows.h"

namespace vqkernels {
namespace cuda {

constexpr int kChunk = 128;       // rows of a chunk
constexpr int kKeyThreads = 256;  // threads of a block, by kernel
constexpr int kChunkThreads = 128;
constexpr int kTotalThreads = 512;
constexpr int kTotalWarps = kTotalThreads / kWarp;
constexpr int kAhead = 8;     // rows that a thread reads before it adds them
constexpr int kMinLanes = 8;  // threads of a chunk; fewer would need too much shared memory for the others
constexpr int kLong = 64;     // a segment of more chunks than this is totalled by all warps of a block

// Keys.

struct KeyArguments {
  Rows z;
  PerRow indices, mask;  // int64, and bytes
  int64_t codes;
  int lanes;  // neighbouring threads that look at one row: 1 where the rows are neighbours in memory, not the channels
  uint32_t *keys, *order;
};

VQ_BOTH int key_lanes(const Rows& z, int width) {
  if (z.channel_stride != 1) return 1;
  int lanes = 1;
  while (lanes < kWarp && lanes * width < z.channels) lanes *= 2;
  return lanes;
}

template <class Z, int kWidth, class Block> VQ_BOTH void write_keys(Block& block, const KeyArguments& a) {
  const int lane = block.thread() % a.lanes, rows_of_block = block.threads() / a.lanes;
  const int64_t flat = block.index() * rows_of_block + block.thread() / a.lanes, total = a.z.total();
  int64_t index = -1;
  int head = 0, bad = 0;
  if (flat < total) {
    const Place place = place_of(a.z, uint32_t(flat));
    head = int(place.head);
    const auto* mask = static_cast<const uint8_t*>(a.mask.data);
    if (mask == nullptr || mask[offset_of(a.mask, place)] != 0)
      index = static_cast<const int64_t*>(a.indices.data)[offset_of(a.indices, place)];
    if (index >= 0 && index < a.codes) {
      const Z* x = static_cast<const Z*>(a.z.data) + offset_of(a.z, place);
      for (int64_t d = int64_t(lane) * kWidth; d < a.z.channels; d += int64_t(a.lanes) * kWidth) {
        const auto packet = *reinterpret_cast<const Packet<Z, kWidth>*>(x + d * a.z.channel_stride);
        for (int v = 0; v < kWidth; ++v) bad |= !is_finite(widen(packet.at[v]));
      }
    }
  }
  for (int other = 1; other < a.lanes; other *= 2) bad |= block.shuffle_xor(bad, other);
  if (flat < total && lane == 0) {
    const bool counts = index >= 0 && index < a.codes && bad == 0;
    a.keys[flat] = uint32_t(counts ? head * a.codes + index : a.z.heads * a.codes);
    a.order[flat] = uint32_t(flat);
  }
}

// Borders: the rows of key k are those from start[k] to start[k + 1] in sorted order.

struct BorderArguments {
  const uint32_t* keys;  // sorted
  int64_t total, groups;
  uint32_t* start;  // groups + 1
};

VQ_BOTH uint32_t first_not_below(const uint32_t* keys, uint32_t total, uint32_t key) {
  uint32_t low = 0, high = total;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (keys[middle] < key) low = middle + 1;
    else high = middle;
  }
  return low;
}

template <class Block> VQ_BOTH void write_borders(Block& block, const BorderArguments& a) {
  const int64_t key = block.index() * block.threads() + block.thread();
  if (key <= a.groups) a.start[key] = first_not_below(a.keys, uint32_t(a.total), uint32_t(key));
}

// Sums.

struct SumArguments {
  Rows z;
  Codes codebook;    // null: sums of z
  const void* grad;  // of the loss, 0-d, or null: no factor
  DType grad_type;
  const int64_t* elements;       // how many elements the loss is the mean of, 0-d
  const uint32_t *keys, *order;  // sorted
  const uint32_t* start;         // of write_borders
  int64_t codes, groups;         // groups = heads * codes
  int lanes;                     // threads of a chunk, see sum_lanes
  double* partials;              // (2 * chunks, channels)
  int64_t* counts;               // (groups), or null
  void* sums;                    // (groups, channels)
  DType sums_type;

  VQ_BOTH double factor() const {
    return grad == nullptr ? 1.0 : 2.0 * load_double(grad, grad_type, 0) / double(*elements);
  }
  VQ_BOTH void write(int64_t group, int64_t d, double sum) const {
    store_double(sums, sums_type, group * z.channels + d, sum);
  }
};

VQ_BOTH int64_t chunks_of(int64_t rows) { return blocks_of(rows, kChunk); }

// How many threads share the channels of a chunk: a power of two; what is left of the block takes other chunks.
VQ_BOTH int sum_lanes(int64_t channels, int width) {
  int lanes = kMinLanes;
  while (lanes < kChunkThreads && int64_t(lanes) * width < channels) lanes *= 2;
  return lanes;
}

// Shared memory of a block: where each of its rows begins, then its keys with one neighbour on either side.
VQ_BOTH constexpr int sum_shared_bytes(int lanes) {
  const int rows = kChunkThreads / lanes * kChunk;
  return rows * 8 + (rows + 2) * 4;
}
static_assert(sum_shared_bytes(kMinLanes) * 4 <= 99 << 10, "four blocks of the narrowest rows fit a multiprocessor");

// Where the sum of a run goes: it is final, or one of the two partials of its chunk.
enum class Run { whole, continued, begun };

VQ_BOTH Run run_of(bool began_before, bool goes_on) {
  return began_before ? Run::continued : goes_on ? Run::begun : Run::whole;
}

template <class Z, int kWidth, class Block> VQ_BOTH void sum_chunks(Block& block, const SumArguments& a) {
  const int lanes = a.lanes, chunks = block.threads() / lanes, rows = chunks * kChunk;
  const uint32_t total = uint32_t(a.z.total()), none = uint32_t(a.groups);
  const int64_t first = block.index() * rows;  // of the block, in sorted order
  const auto where = block.template shared<int64_t>(0);
  const auto keys = block.template shared<uint32_t>(rows * 8);  // keys.get(i + 1) is that of row i of the block
  for (int i = block.thread(); i < rows + 2; i += block.threads()) {
    const int64_t at = first + i - 1;
    const uint32_t key = at >= 0 && at < total ? a.keys[at] : none;
    keys.set(i, key);
    if (i >= 1 && i <= rows) where.set(i - 1, key < none ? offset_of(a.z, place_of(a.z, a.order[at])) : 0);
  }
  block.sync();

  const int chunk = block.thread() / lanes, begin = chunk * kChunk;
  const int64_t d = (block.index_y() * lanes + block.thread() % lanes) * kWidth;
  if (d >= a.z.channels) return;
  const Z* z = static_cast<const Z*>(a.z.data) + d * a.z.channel_stride;
  const double factor = a.factor();
  double sum[kWidth] = {}, code[kWidth] = {};
  // The row before the first of all has the key of no code: no run begins before row 0.
  uint32_t run = keys.get(begin + 1);
  bool began_before = keys.get(begin) == run;
  const auto read_code = [&](uint32_t key) {
    const int64_t head = key / uint32_t(a.codes), index = key - uint32_t(head) * uint32_t(a.codes);
    for (int v = 0; v < kWidth; ++v)
      code[v] = load_double(
          a.codebook.data, a.codebook.dtype,
          head * a.codebook.head_stride + index * a.codebook.code_stride + (d + v) * a.codebook.channel_stride);
  };
  const auto flush = [&](bool goes_on) {
    const Run kind = run_of(began_before, goes_on);
    double* partial = a.partials + (2 * (first / kChunk + chunk) + (kind == Run::begun)) * a.z.channels + d;
    for (int v = 0; v < kWidth; ++v) {
      if (kind == Run::whole) a.write(run, d + v, factor * sum[v]);
      else partial[v] = sum[v];
      sum[v] = 0.0;
    }
  };
  if (run >= none) return;
  if (a.codebook.data != nullptr) read_code(run);
  for (int base = begin; base < begin + kChunk; base += kAhead) {
    Packet<Z, kWidth> ahead[kAhead];
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < kAhead; ++i)
      if (keys.get(base + i + 1) < none)
        ahead[i] = *reinterpret_cast<const Packet<Z, kWidth>*>(z + where.get(base + i));
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t key = keys.get(base + i + 1);
      if (key != run && run < none) {
        flush(false);
        run = key;
        began_before = false;
        if (key < none && a.codebook.data != nullptr) read_code(key);
      }
      if (key < none)
        for (int v = 0; v < kWidth; ++v) {
          const double x = double(widen(ahead[i].at[v]));
          sum[v] += a.codebook.data != nullptr ? code[v] - x : x;
        }
    }
  }
  if (run < none) flush(keys.get(begin + kChunk + 1) == run);
}

// Totals: counts, the sums of segments without rows and of segments over several chunks.

// Partial number i of a segment whose rows are [begin, end) of the sorted order.
VQ_BOTH int64_t partial_of(uint32_t begin, int64_t i) {
  const int64_t chunk = begin / kChunk;
  // A segment that begins in the middle of a chunk begins with that chunk's last run, one that begins with a chunk too.
  return i == 0 ? 2 * chunk + 1 : 2 * (chunk + i);
}

// How many partials a segment left; none where it lies in one chunk.
VQ_BOTH int64_t partials_of(uint32_t begin, uint32_t end) {
  if (begin == end || begin / kChunk == (end - 1) / kChunk) return 0;
  return int64_t((end - 1) / kChunk) - int64_t(begin / kChunk) + 1;
}

// Partials [first, last) of a segment, added in order.
VQ_BOTH double add_partials(const SumArguments& a, uint32_t begin, int64_t first, int64_t last, int64_t d) {
  double sum = 0.0;
  for (int64_t base = first; base < last; base += kAhead) {
    double ahead[kAhead];
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < kAhead; ++i)
      ahead[i] = base + i < last ? a.partials[partial_of(begin, base + i) * a.z.channels + d] : 0.0;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < kAhead; ++i)
      if (base + i < last) sum += ahead[i];
  }
  return sum;
}

// kTotalWarps codes per block, a warp each; a code of more than kLong partials is left to all warps, a share each in
// order, and the shares are added in order.
template <class Block> VQ_BOTH void write_totals(Block& block, const SumArguments& a) {
  const int warp = block.thread() / kWarp, lane = block.thread() % kWarp;
  const int64_t first = block.index() * kTotalWarps, own = first + warp;
  const double factor = a.factor();
  if (own < a.groups) {
    const uint32_t begin = a.start[own], end = a.start[own + 1];
    const int64_t count = partials_of(begin, end);
    if (lane == 0 && a.counts != nullptr) a.counts[own] = end - begin;
    if (begin == end || (count > 0 && count <= kLong))
      for (int64_t d = lane; d < a.z.channels; d += kWarp)
        a.write(own, d, begin == end ? 0.0 : factor * add_partials(a, begin, 0, count, d));  // 0 even of factor inf
  }
  const auto shares = block.template shared<double>(0);
  for (int code = 0; code < kTotalWarps && first + code < a.groups; ++code) {
    const int64_t group = first + code;
    const uint32_t begin = a.start[group];
    const int64_t count = partials_of(begin, a.start[group + 1]), share = blocks_of(count, kTotalWarps);
    if (count <= kLong) continue;
    for (int64_t base = 0; base < a.z.channels; base += kWarp) {
      const int64_t d = base + lane, from = warp * share, to = from + share < count ? from + share : count;
      shares.set(block.thread(), d < a.z.channels ? add_partials(a, begin, from, to, d) : 0.0);
      block.sync();
      if (warp == 0 && d < a.z.channels) {
        double sum = 0.0;
        for (int w = 0; w < kTotalWarps; ++w) sum += shares.get(w * kWarp + lane);
        a.write(group, d, factor * sum);
      }
      block.sync();
    }
  }
}

constexpr int kTotalSharedBytes = kTotalThreads * 8;

}  // namespace cuda
}  // namespace vqkernels
