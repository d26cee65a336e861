#include <stdlib.h>
#include <string.h>

#include <iterator>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace vqkernels {

const Kernels& baseline_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& vnni_kernels();

namespace {

// Lowest first: a CPU has a level only if it has those before it.
constexpr Level kLevels[] = {
    {"baseline", [] { return true; }, baseline_kernels},
#if defined(__x86_64__)
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2_kernels},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     avx512_kernels},
    {"vnni", [] { return __builtin_cpu_supports("avx512vnni") != 0; }, vnni_kernels},  // the 16-bit dot product
#endif
};

std::string level_names() {
  std::string names;
  for (const Level& level : kLevels) {
    if (&level != kLevels) names += &level + 1 == std::end(kLevels) ? " or " : ", ";
    names += level.name;
  }
  return names;
}

}  // namespace

const std::vector<Level>& levels() {
  static const std::vector<Level> found = [] {
    std::vector<Level> some;
    for (const Level& level : kLevels) {
      if (!level.supported()) break;
      some.push_back(level);
    }
    return some;
  }();
  return found;
}

const Kernels& active() {
  const char* name = getenv("VQKERNELS_SIMD");
  if (name == nullptr || *name == '\0') return levels().back().kernels();
  for (const Level& level : levels())
    if (strcmp(name, level.name) == 0) return level.kernels();
  for (const Level& level : kLevels)
    if (strcmp(name, level.name) == 0)
      throw std::runtime_error(std::string("VQKERNELS_SIMD=") + name + " but this CPU lacks it");
  throw std::runtime_error("VQKERNELS_SIMD must be " + level_names() + ", got '" + name + "'");
}

}  // namespace vqkernels
