// The candidate pass: packed rows times packed codes on the tensor core, reduced as it is produced.
//
// Fused: product, score ½|Y|² - beta q·p in one multiply-add, minima of groups of eight codes, running best and second
// best. Never materialised: the N x K scores. Traffic: packed codes once per 128 rows; packed rows once up to D' = 128,
// else once per 64 codes, from cache.
//
// 128 rows per block, 32 per warp: two products of 16 rows share every fragment of codes. Codes arrive 64 at a time in
// a ring of three stages: while one is multiplied, one is in flight and one is being asked for; one barrier per step
// orders them. Up to D' = 128 a warp keeps its rows as fragments in registers (D' / 2 of them); beyond, `kStreamed`,
// rows come through the ring too, 64 channels at a time, and the sums of 64 codes stay in registers over the slices.
// Everything of a row and a place stays in one lane until the end, when the four places are merged (fragment.h).
// Ties: groups ascend and comparisons are strict, so the lowest group stays; the certificate does not decide such rows.
// Padding codes have a half norm of +inf and lose every comparison.
#pragma once
#include "fragment.h"

namespace vqkernels {
namespace cuda {

constexpr int kSearchThreads = 128, kSearchRows = 128, kSearchCodes = 64, kStages = 3;
constexpr int kResident = 128;  // the largest D' of rows that stay in registers
constexpr int kStreamSlice = 64;

struct SearchArguments {
  const uint16_t *rows, *codes;  // (heads, padded rows, padded), (heads, padded codes, padded): fp16
  const float* half_norms;       // (heads, padded codes)
  const float* beta;             // (heads, padded rows): what takes q·p to code units
  float *best, *second;          // (splits, heads, padded rows)
  int* group;
  int64_t padded_rows, padded_codes;
  int padded, heads, splits, tiles, tiles_per_split;
};

struct Pair {
  float first, next;
};

VQ_BOTH constexpr int row_bytes(int slice) { return 2 * slice; }
VQ_BOTH constexpr int stage_bytes(int slice, bool streamed) {
  return (streamed ? kSearchRows * row_bytes(slice) : 0) + kSearchCodes * row_bytes(slice) + kSearchCodes * 4;
}
VQ_BOTH constexpr int search_shared_bytes(int slice, bool streamed) {
  const int ring = kStages * stage_bytes(slice, streamed), rows = kSearchRows * row_bytes(slice);
  return ring > rows ? ring : rows;
}

// Asks for `count` rows of kSlice channels, `pitch` numbers apart in global memory, as chunks from `to` on.
template <int kSlice, int kCount, class Block>
VQ_BOTH void fetch_rows(Block& block, typename Block::template Shared<Chunk> to, const uint16_t* from, int64_t pitch) {
  constexpr int kChunks = kSlice / kChunkNumbers, kStep = kSearchThreads / kChunks;  // a multiple of 8 rows
  const int row = block.thread() / kChunks, chunk = block.thread() % kChunks;
  const uint16_t* source = from + row * pitch + chunk * kChunkNumbers;
  const int place = swizzled(row, chunk, kChunks);
  VQ_UNROLL
  for (int i = 0; i < kCount / kStep; ++i)
    block.copy_async(to, place + i * kSearchThreads, reinterpret_cast<const Chunk*>(source + i * kStep * pitch));
  if (kCount % kStep != 0 && row < kCount % kStep)  // few channels: fewer chunks than threads
    block.copy_async(to, place + (kCount / kStep) * kSearchThreads,
                     reinterpret_cast<const Chunk*>(source + (kCount / kStep) * kStep * pitch));
}

// Folds the sums of 16 rows and a block of 32 codes into the bests of this lane's two rows.
template <class Block>
VQ_BOTH void fold(Block&, const float (&sum)[4][4], const Pair (&half)[4], const float* scale, Best* best, int number) {
  VQ_UNROLL
  for (int h = 0; h < 2; ++h) {
    float lowest = INFINITY;
    VQ_UNROLL
    for (int n = 0; n < 4; ++n) {
      lowest = fminf(lowest, fmaf(-scale[h], sum[n][2 * h], half[n].first));
      lowest = fminf(lowest, fmaf(-scale[h], sum[n][2 * h + 1], half[n].next));
    }
    include(best[h], lowest, number);
  }
}

template <int kSlice, bool kStreamed, class Block> VQ_BOTH void search_block(Block& block, const SearchArguments& g) {
  constexpr int kChunks = kSlice / kChunkNumbers, kDepth = kSlice / kProductDepth;
  constexpr int kBlocks = kSearchCodes / kBlockCodes;
  constexpr int kCodesAt = kStreamed ? kSearchRows * row_bytes(kSlice) : 0;
  constexpr int kHalvesAt = kCodesAt + kSearchCodes * row_bytes(kSlice), kStage = kHalvesAt + kSearchCodes * 4;

  const int lane = block.thread() % kWarp, warp = block.thread() / kWarp, place = lane % 4;
  const int64_t head = block.index_y(), row_tile = block.index() / g.splits;
  const int split = int(block.index() % g.splits);
  const int first = split * g.tiles_per_split;
  const int last = first + g.tiles_per_split < g.tiles ? first + g.tiles_per_split : g.tiles;
  const int slices = kStreamed ? g.padded / kSlice : 1, steps = (last - first) * slices;
  const int64_t pitch = kStreamed ? g.padded : kSlice;
  const int64_t first_row = head * g.padded_rows + row_tile * kSearchRows;
  const uint16_t* rows = g.rows + first_row * pitch;
  const uint16_t* codes = g.codes + (head * g.padded_codes + int64_t(first) * kSearchCodes) * pitch;
  const float* halves = g.half_norms + head * g.padded_codes + int64_t(first) * kSearchCodes;

  const Spot left_at = a_address(lane), right_at = b_address(lane);
  const int warp_row = warp * 2 * kProductRows;

  uint32_t left[2][kStreamed ? 1 : kDepth][4];
  if constexpr (!kStreamed) {
    const auto all = block.template shared<Chunk>(0);
    fetch_rows<kSlice, kSearchRows>(block, all, rows, pitch);
    block.commit();
    block.template wait<0>();
    block.sync();
    VQ_UNROLL
    for (int m = 0; m < 2; ++m) VQ_UNROLL
    for (int k = 0; k < kDepth; ++k)
      load_matrices(block, all, swizzled(warp_row + m * kProductRows + left_at.row, 2 * k + left_at.column, kChunks),
                    left[m][k]);
    block.sync();
  }

  float scale[4];
  Best best[4];
  VQ_UNROLL
  for (int i = 0; i < 4; ++i) {
    scale[i] = g.beta[first_row + warp_row + 8 * i + lane / 4];
    best[i] = none();
  }

  int asked_tile = 0, asked_slice = 0;  // of the next step to ask for
  const auto ask = [&](int stage) {
    if (asked_tile < last - first) {
      const int tile = asked_tile, slice = asked_slice, at = stage * kStage;
      if (++asked_slice == slices) ++asked_tile, asked_slice = 0;
      if constexpr (kStreamed)
        fetch_rows<kSlice, kSearchRows>(block, block.template shared<Chunk>(at), rows + slice * kSlice, pitch);
      fetch_rows<kSlice, kSearchCodes>(block, block.template shared<Chunk>(at + kCodesAt),
                                       codes + int64_t(tile) * kSearchCodes * pitch + slice * kSlice, pitch);
      if (block.thread() < kSearchCodes / 4)
        block.copy_async(block.template shared<Chunk>(at + kHalvesAt), block.thread(),
                         reinterpret_cast<const Chunk*>(halves + int64_t(tile) * kSearchCodes) + block.thread());
    }
    block.commit();
  };
  ask(0);
  ask(1);

  constexpr int kSums = kStreamed ? kBlocks : 1;  // blocks of 32 codes whose sums are alive at once
  float sum[kSums][2][4][4];
  const auto clear = [&] {
    VQ_UNROLL
    for (int i = 0; i < kSums * 32; ++i) (&sum[0][0][0][0])[i] = 0.0f;
  };
  clear();
  int stage = 0, slice = 0, number = first * kBlocks;
  for (int step = 0; step < steps; ++step) {
    block.template wait<1>();
    block.sync();  // this step's codes are here, and nobody reads the last step's any more
    ask(stage == 0 ? 2 : stage - 1);
    const int at = stage * kStage;
    const auto right_rows = block.template shared<Chunk>(at + kCodesAt);
    const auto half_at = block.template shared<Pair>(at + kHalvesAt);
    stage = stage == 2 ? 0 : stage + 1;
    const auto multiply_block = [&](int b, int k, const uint32_t (&l0)[4], const uint32_t (&l1)[4],
                                    float (&to)[2][4][4]) {
      VQ_UNROLL
      for (int p = 0; p < 2; ++p) {
        uint32_t right[4];
        load_matrices(block, right_rows,
                      swizzled(b * kBlockCodes + 16 * p + right_at.row, 2 * k + right_at.column, kChunks), right);
        VQ_UNROLL
        for (int n = 0; n < 2; ++n) {
          multiply(block, to[0][2 * p + n], l0, right[2 * n], right[2 * n + 1]);
          multiply(block, to[1][2 * p + n], l1, right[2 * n], right[2 * n + 1]);
        }
      }
    };
    const auto reduce = [&](int b, const float (&from)[2][4][4]) {
      Pair half[4];
      VQ_UNROLL
      for (int n = 0; n < 4; ++n) half[n] = half_at.get(b * 16 + 4 * n + place);
      VQ_UNROLL
      for (int m = 0; m < 2; ++m) fold(block, from[m], half, scale + 2 * m, best + 2 * m, number + b);
    };
    if constexpr (kStreamed) {
      const auto left_rows = block.template shared<Chunk>(at);
      VQ_UNROLL
      for (int k = 0; k < kDepth; ++k) {
        uint32_t l[2][4];
        VQ_UNROLL
        for (int m = 0; m < 2; ++m)
          load_matrices(block, left_rows,
                        swizzled(warp_row + m * kProductRows + left_at.row, 2 * k + left_at.column, kChunks), l[m]);
        VQ_UNROLL
        for (int b = 0; b < kBlocks; ++b) multiply_block(b, k, l[0], l[1], sum[b]);
      }
      if (++slice == slices) {
        VQ_UNROLL
        for (int b = 0; b < kBlocks; ++b) reduce(b, sum[b]);
        clear();
        slice = 0;
        number += kBlocks;
      }
    } else {
      VQ_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        clear();
        VQ_UNROLL
        for (int k = 0; k < kDepth; ++k) multiply_block(b, k, left[0][k], left[1][k], sum[0]);
        reduce(b, sum[0]);
      }
      number += kBlocks;
    }
  }

  const int64_t out = (int64_t(split) * g.heads + head) * g.padded_rows + row_tile * kSearchRows + warp_row + lane / 4;
  VQ_UNROLL
  for (int i = 0; i < 4; ++i) {
    Best mine = best[i];
    mine.group = group_of(mine.group, place);
    VQ_UNROLL
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      const Best other = {block.shuffle_xor(mine.best, lanes), block.shuffle_xor(mine.second, lanes),
                          block.shuffle_xor(mine.group, lanes)};
      mine = merged(mine, other);
    }
    if (place == 0) {
      g.best[out + 8 * i] = mine.best;
      g.second[out + 8 * i] = mine.second;
      g.group[out + 8 * i] = mine.group;
    }
  }
}

}  // namespace cuda
}  // namespace vqkernels
