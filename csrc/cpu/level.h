// SIMD levels: one enum, one dispatcher. Kernels are compiled once per level and chosen at run time.
#pragma once

namespace vqkernels {

enum class Level : int { baseline, avx2, avx512, vnni };

// The level in force: the highest that this CPU has, or the one named by VQKERNELS_SIMD (baseline, avx2, avx512,
// vnni: AVX-512 with its 16-bit dot product).
// Throws std::runtime_error where the named level is unknown or absent. Read at every call, so tests can switch.
Level active_level();

bool has_level(Level level);
const char* level_name(Level level);

}  // namespace vqkernels
