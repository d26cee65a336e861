// Random numbers that are functions of what they belong to: (seed, stream, row) gives a key, (key, code) 32 bits. No
// state, so threads, tiles and batch splits draw the same. The twin of vqkernels/backends/counter.py.
//
// Keys are SplitMix64 (Steele, Lea, Flood 2014): output number `row` of the generator that (seed, stream) starts. A
// code's bits are two rounds of MurmurHash3's 32-bit finaliser (Appleby 2011) with half of the key added before each:
// for one key a permutation, so different codes never draw equal bits.
#pragma once
#include <stdint.h>

namespace vqkernels {

constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Where the generator of (seed, stream) starts.
inline uint64_t stream_start(int64_t seed, int64_t stream) {
  return mix(mix(uint64_t(seed) + kStep) + (uint64_t(stream) + 1) * kStep);
}

inline uint64_t row_key(uint64_t start, int64_t row) { return mix(start + (uint64_t(row) + 1) * kStep); }

namespace {  // of each translation unit: vectors of different SIMD levels must not share a copy

// x becomes the 32 bits of code x for the key with these halves. T is uint32_t, or a vector of them.
template <class T> inline __attribute__((always_inline)) void to_bits(T& x, const T& low, const T& high) {
  x += low;
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  x = (x ^ (x >> 16)) + high;
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  x ^= x >> 16;
}

}  // namespace

}  // namespace vqkernels
