// Who holds what: the index maps of the candidate pass, all of them plain functions of lane and register.
//
// The tensor core's shape is mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"). With
// quad = lane / 4 and place = lane % 4, a lane holds of
//   A (16 rows x 16 channels)  four registers of two channels: row quad (+8 for registers 1, 3), channels 2 place (+8 for
//                              registers 2, 3) and the next
//   B (16 channels x 8 codes)  two registers of two channels: channels 2 place (+8 for register 1) and the next, code quad
//   C (16 rows x 8 codes)      four sums: row quad (+8 for sums 2, 3), code 2 place (+1 for sums 1, 3)
// So over four neighbouring products a lane sees, of a row, codes 8 j + 2 place + e of a block of 32, j < 4, e < 2: the
// group of eight whose minimum it keeps. Group g = 4 block + place: the numbering of
// vqkernels/backends/triton/resolve.py.
//
// Operands lie in shared memory as rows of CHUNKS chunks of 16 bytes (8 channels). ldmatrix reads one chunk of eight
// consecutive rows at a time; the chunk's place is permuted so that these fall into eight different 16-byte banks.
#pragma once
#include <math.h>
#include <stdint.h>

#include "portable.h"

#if defined(__CUDACC__)
#define VQ_UNROLL _Pragma("unroll")
#define VQ_ROLLED _Pragma("unroll 1")
#else
#define VQ_UNROLL
#define VQ_ROLLED
#endif

namespace vqkernels {
namespace cuda {

constexpr int kProductRows = 16, kProductCodes = 8, kProductDepth = 16;  // of one mma
constexpr int kGroup = 8;                                                // codes of a group
constexpr int kBlockCodes = 32;                                          // codes whose groups the four places share
constexpr int kChunkNumbers = 8;                                         // fp16 numbers of 16 bytes

struct alignas(16) Chunk {
  uint32_t word[4];
};

struct Spot {
  int row, column;
};

// Element e (0, 1) of register r of the left operand: (row, channel).
VQ_BOTH Spot a_place(int lane, int r, int e) { return {lane / 4 + 8 * (r & 1), 2 * (lane % 4) + 8 * (r >> 1) + e}; }

// Element e (0, 1) of register r of the right operand: (channel, code).
VQ_BOTH Spot b_place(int lane, int r, int e) { return {2 * (lane % 4) + 8 * r + e, lane / 4}; }

// Sum r of the product: (row, code).
VQ_BOTH Spot c_place(int lane, int r) { return {lane / 4 + 8 * (r >> 1), 2 * (lane % 4) + (r & 1)}; }

// The row and chunk whose address a lane gives to ldmatrix.x4, such that the four registers it returns are
// a_place's registers 0..3 of 16 rows and one step of 16 channels (two chunks).
VQ_BOTH Spot a_address(int lane) { return {lane & 15, lane >> 4}; }

// The same for the right operand: registers 0, 1 of codes 0..7 and then of codes 8..15.
VQ_BOTH Spot b_address(int lane) { return {(lane & 7) + 8 * (lane >> 4), (lane >> 3) & 1}; }

// Where chunk `chunk` of row `row` lies, in chunks from the start of an operand of `chunks` (2, 4, 8 or 16) per row.
VQ_BOTH int swizzled(int row, int chunk, int chunks) {
  const int rows_per_line = chunks >= 8 ? 1 : 8 / chunks, mask = chunks >= 8 ? 7 : chunks - 1;
  return row * chunks + (chunk ^ ((row / rows_per_line) & mask));
}

VQ_BOTH int group_of(int block, int place) { return 4 * block + place; }

// Member m (0..7) of a group, as a code; the members ascend.
VQ_BOTH int64_t member_code(int group, int m) {
  return int64_t(group >> 2) * kBlockCodes + 8 * (m >> 1) + 2 * (group & 3) + (m & 1);
}

// D as the packed operands store it: a power of two up to 128, then a multiple of 64.
VQ_BOTH int padded_channels(int64_t channels) {
  if (channels > 128) return int((channels + 63) / 64 * 64);
  int padded = 16;
  while (padded < channels) padded *= 2;
  return padded;
}

// What a lane knows of a row's scores: the smallest group minimum, the smallest of all other groups, and whose the
// first is. Groups come in ascending order and the comparison is strict, so of equal minima the lowest group stays.
struct Best {
  float best, second;
  int group;
};

VQ_BOTH Best none() { return {INFINITY, INFINITY, 0}; }

VQ_BOTH void include(Best& state, float minimum, int group) {
  state.second = fminf(state.second, fmaxf(state.best, minimum));
  if (minimum < state.best) state.group = group;
  state.best = fminf(state.best, minimum);
}

// Two disjoint sets of groups; of equal minima the lower group wins, whichever side it is on.
VQ_BOTH Best merged(const Best& a, const Best& b) {
  const bool take = b.best < a.best || (b.best == a.best && b.group < a.group);
  return {take ? b.best : a.best, fminf(fminf(a.second, b.second), take ? a.best : b.best), take ? b.group : a.group};
}

}  // namespace cuda
}  // namespace vqkernels
