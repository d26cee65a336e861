// The block of portable.h on the device: every member is one intrinsic.
#pragma once
#include "portable.h"

namespace vqkernels {

extern __shared__ __align__(128) unsigned char vqkernels_shared[];

template <class T> struct DeviceShared {
  T* data;
  __device__ __forceinline__ T get(int i) const { return data[i]; }
  __device__ __forceinline__ void set(int i, T x) const { data[i] = x; }
};

struct DeviceBlock {
  template <class T> using Shared = DeviceShared<T>;
  static constexpr unsigned kAll = 0xffffffffu;

  __device__ __forceinline__ int thread() const { return int(threadIdx.x); }
  __device__ __forceinline__ int threads() const { return int(blockDim.x); }
  __device__ __forceinline__ int64_t index() const { return blockIdx.x; }
  __device__ __forceinline__ int64_t index_y() const { return blockIdx.y; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }
  template <class T> __device__ __forceinline__ T shuffle(T x, int lane) const { return __shfl_sync(kAll, x, lane); }
  template <class T> __device__ __forceinline__ T shuffle_xor(T x, int lanes) const {
    return __shfl_xor_sync(kAll, x, lanes);
  }
  __device__ __forceinline__ uint32_t ballot(bool x) const { return __ballot_sync(kAll, x); }

  template <class T> __device__ __forceinline__ DeviceShared<T> shared(int bytes) const {
    return {reinterpret_cast<T*>(vqkernels_shared + bytes)};
  }
  template <class T> __device__ __forceinline__ void copy_async(DeviceShared<T> to, int i, const T* from) const {
    static_assert(sizeof(T) == 16, "cp.async copies 16 bytes");
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to.data + i));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  }
  __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kPending> __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }
};

}  // namespace vqkernels
