// What lets one source be a CUDA kernel under nvcc and a plain function under a host compiler.
//
// A kernel here is a block program: a function template `body(Block& block, const Arguments&)` that every thread of a
// block runs. `Block` says who the thread is and how it meets the others:
//
//   int thread(), threads(); int64_t index(), index_y()   threadIdx.x, blockDim.x, blockIdx.x, blockIdx.y
//   void sync(), sync_warp()                              __syncthreads, __syncwarp of all 32 lanes
//   T shuffle(T, lane), shuffle_xor(T, lanes)             __shfl_sync, __shfl_xor_sync of all 32 lanes, T of 4 or 8 bytes
//   uint32_t ballot(bool)                                 __ballot_sync of all 32 lanes
//   Shared<T> shared<T>(bytes)                            the T's from this byte of the shared memory on: get(i), set(i, x)
//   void copy_async(Shared<T>, i, const T*)               cp.async of 16 bytes into element i; T is of 16 bytes
//   void commit(), wait<n>()                              cp.async.commit_group, cp.async.wait_group n
//
// DeviceBlock (device_block.cuh) maps these to the intrinsics. The executor of tests/native/cuda_executor.h runs the
// same bodies thread by thread on a CPU and reports every access to shared memory that no barrier orders.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define VQ_BOTH __host__ __device__ __forceinline__
#else
#define VQ_BOTH inline
#endif

namespace vqkernels {

constexpr int kWarp = 32;

// Rounded-up quotient.
VQ_BOTH constexpr int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace vqkernels
