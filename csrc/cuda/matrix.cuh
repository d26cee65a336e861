// The tensor core and the other instructions of a whole warp, on the device. tests/native/cuda_matrix.h has the same
// functions for the executor's block.
#pragma once
#include "device_block.cuh"
#include "fragment.h"

namespace vqkernels {

// Four 8 x 8 matrices of fp16 numbers: lane l gives the address of row l % 8 of matrix l / 8, chunk `i` of `from`, and
// gets two numbers of row l / 4 of each.
__device__ __forceinline__ void load_matrices(const DeviceBlock&, DeviceShared<cuda::Chunk> from, int i,
                                              uint32_t (&out)[4]) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(from.data + i));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
}

// sum += left · right, registers as in fragment.h.
__device__ __forceinline__ void multiply(const DeviceBlock&, float (&sum)[4], const uint32_t (&left)[4],
                                         uint32_t right0, uint32_t right1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

// Integers in global memory: sums of them do not depend on the order. Returns what was there.
__device__ __forceinline__ int add_globally(const DeviceBlock&, int* at, int x) { return atomicAdd(at, x); }
__device__ __forceinline__ void add_globally(const DeviceBlock&, int64_t* at, int64_t x) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(x));
}

// What this thread wrote is visible to all blocks before what it writes next.
__device__ __forceinline__ void fence_globally(const DeviceBlock&) { __threadfence(); }

// Past the first-level cache, which does not see what other blocks write.
__device__ __forceinline__ double read_globally(const DeviceBlock&, const double* at) { return __ldcg(at); }

}  // namespace vqkernels
