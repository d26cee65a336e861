// The instructions of a whole warp for the executor's block, from the tables of the PTX ISA and nothing of csrc/cuda's
// maps.
//
// mma.m16n8k16, fp16 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"), with
//   groupID = %laneid >> 2,  threadID_in_group = %laneid % 4
//   A, elements a0..a7:  row = groupID      for ai where 0 <= i < 2 || 4 <= i < 6, else groupID + 8
//                        col = (threadID_in_group * 2) + (i & 0x1)      for ai where i < 4, else that + 8
//   B, elements b0..b3:  row = (threadID_in_group * 2) + (i & 0x1)      for bi where i < 2, else that + 8;  col = groupID
//   C, elements c0..c3:  row = groupID for ci where i < 2, else groupID + 8;  col = (threadID_in_group * 2) + (i & 0x1)
// ldmatrix .x4: threads 0-7, 8-15, 16-23, 24-31 hold the row addresses of matrices 0, 1, 2, 3; thread t receives
// elements 2 (t % 4) and the next of row t / 4 of each.
#pragma once
#include <string.h>

#include "../../csrc/cpu/element.h"
#include "../../csrc/cuda/fragment.h"
#include "cuda_executor.h"

namespace isa {

struct Place {
  int row, col;
};
inline Place a(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {(0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8, in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
inline Place b(int lane, int i) { return {(lane % 4) * 2 + (i & 1) + (i < 2 ? 0 : 8), lane >> 2}; }
inline Place c(int lane, int i) { return {(lane >> 2) + (i < 2 ? 0 : 8), (lane % 4) * 2 + (i & 1)}; }

}  // namespace isa

namespace executor {

inline float half_of(uint32_t word, int i) {
  return vqkernels::widen(vqkernels::Float16{uint16_t(i == 0 ? word & 0xffffu : word >> 16)});
}

inline void load_matrices(const HostBlock& block, HostShared<vqkernels::cuda::Chunk> from, int i, uint32_t (&out)[4]) {
  const vqkernels::cuda::Chunk mine = from.get(i);
  const vqkernels::cuda::Chunk* all[vqkernels::kWarp];
  block.every_lane(mine, all);
  const int lane = block.thread() % vqkernels::kWarp;
  for (int m = 0; m < 4; ++m) out[m] = all[8 * m + lane / 4]->word[lane % 4];
  block.sync_warp();
}

inline void multiply(const HostBlock& block, float (&sum)[4], const uint32_t (&left)[4], uint32_t right0,
                     uint32_t right1) {
  struct Registers {
    uint32_t left[4], right[2];
  } mine = {{left[0], left[1], left[2], left[3]}, {right0, right1}};
  const Registers* all[vqkernels::kWarp];
  block.every_lane(mine, all);
  const int lane = block.thread() % vqkernels::kWarp;
  float a[2][16], b[2][16];  // this lane's two rows of the left and two columns of the right operand
  for (int other = 0; other < vqkernels::kWarp; ++other) {
    for (int i = 0; i < 8; ++i) {
      const isa::Place at = isa::a(other, i);
      for (int h = 0; h < 2; ++h)
        if (at.row == isa::c(lane, 2 * h).row) a[h][at.col] = half_of(all[other]->left[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      const isa::Place at = isa::b(other, i);
      for (int e = 0; e < 2; ++e)
        if (at.col == isa::c(lane, e).col) b[e][at.row] = half_of(all[other]->right[i / 2], i % 2);
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) sum[i] += a[i / 2][k] * b[i % 2][k];
  block.sync_warp();
}

inline int add_globally(const HostBlock&, int* at, int x) { return (*at += x) - x; }
inline void add_globally(const HostBlock&, int64_t* at, int64_t x) { *at += x; }
inline void fence_globally(const HostBlock&) {}
inline double read_globally(const HostBlock&, const double* at) { return *at; }

}  // namespace executor
